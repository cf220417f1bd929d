"""Requests over HTTP for tests, and a server of a tiny model's processor whose answers are scripted: nothing is compiled."""

import base64
import contextlib
import io
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import uvicorn
from PIL import Image

from gp_jax.inference.requests import resolve
from gp_jax.pretrained.hf_config import glimpse_config, model_config
from gp_jax.processing.qwen import Processor
from gp_jax.pruning.rule import Prune
from gp_jax.serving.app import Api
from gp_jax.serving.inbox import Inbox
from gp_jax.serving.jobs import Ended, Started, Tokens
from gp_jax.serving.meters import Meters
from gp_jax.serving.preparing import Preparation
from gp_jax.serving.server import Listening, Server, listen
from gp_jax.serving.settings import ServerSettings
from gp_jax.tiny import CONFIG, ID, PROCESSOR, write_tokenizer

SLOTS, LONGEST = 32, 384
SMALL = CONFIG | {"num_hidden_layers": 2, "selected_layers": [0], "reduce_layer": 0, "le_layers": [0, 1]}
SMALL |= {"vision_config": CONFIG["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}, "selected_visual_layers": [1, 0]}
ANSWER = "a red house, a tree."


def url(size: tuple[int, int] = (112, 84), seed: int = 0) -> str:
    """A picture as a data: URL."""
    pixels, file = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(text: str = "what is this?", *pictures: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": own}} for own in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def complete(client, messages, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **{"temperature": 0, "max_tokens": 12, **options})


def settings():
    limits = dict(max_new_tokens=SLOTS, max_pictures=2, max_pixels=20_000, max_body="1M")
    return ServerSettings("tiny", max_prompt=LONGEST - 1, port=0, api_key="secret", **limits)


@contextlib.contextmanager
def running(made: Server):
    """The server on a free port, in a thread."""
    listener = listen(made.settings)
    made.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    made.running = Listening(uvicorn.Config(made.asgi, log_config=None, lifespan="off", timeout_graceful_shutdown=5), made.loop)
    made.thread = threading.Thread(target=made.running.run, kwargs=dict(sockets=[listener]))
    made.thread.start()
    while not made.running.started:
        time.sleep(0.01)
    yield made
    made.running.should_exit = True
    made.thread.join(20)
    made.loop.stop()
    made.loop.join(20)
    assert not made.thread.is_alive() and not made.loop.is_alive()


class Scripted(threading.Thread):
    """Gives everybody the same answer, a letter at a time."""

    healthy = True

    def __init__(self, limit: int, letters: list[int]):
        super().__init__(daemon=True)
        self.inbox, self.letters, self.now, self.post, self.left = Inbox(limit), letters, None, None, 0
        self.pause, self.submit, self.stop = 0.01, self.inbox.put, self.inbox.stop

    @property
    def idle(self):
        return not len(self.inbox) and self.now is None

    def cancel(self, job):
        job.gone = True

    def drain(self):
        self.inbox.draining = True

    def retry_after(self):
        return 3

    def run(self):
        while not self.inbox.stopping:
            self.now = job = self.inbox.take()
            if job is None:
                self.inbox.wait(0.05)
                continue
            job.times["begun"] = job.times["first"] = time.monotonic()
            count = job.sample.count
            events = [Started(np.ones(count, bool), np.ones(count, np.float32), 0, len(job.pictures))]
            for letter in self.letters[: job.max_new_tokens]:
                events.append(Tokens(np.array([letter]), np.array([-0.5]) if job.noted else None))
            for event in (*events, Ended("length" if job.max_new_tokens < len(ANSWER) else "stop")):
                if job.gone:
                    self.left += 1
                    break
                self.post([(job, event)])
                time.sleep(self.pause)


def scripted(folder) -> Server:
    """A server with the tiny model's processor and no model."""
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    config = model_config(SMALL, {"eos_token_id": ID["<|im_end|>"], "pad_token_id": ID["<|endoftext|>"]})
    glimpse = glimpse_config(SMALL, config)
    processor = Processor.load(folder, config)
    own, meters = settings(), Meters("tiny")
    loop = Scripted(8, processor.tokenize([ANSWER], prompts=False)[0])
    vlm = SimpleNamespace(config=config, glimpse_config=glimpse, processor=processor)
    vlm.resolve_shortest = lambda prune: resolve(prune, glimpse, 2)
    plans = frozenset({(), resolve(Prune(), glimpse, 2).plan})
    reader = SimpleNamespace(check=lambda sample: None)
    return Server(own, vlm, None, loop, Api(own, loop, Preparation(vlm, own, reader, plans), meters))
