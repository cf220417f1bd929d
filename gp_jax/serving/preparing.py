"""From a checked request to arrays: pictures are opened, the chat template is applied, tokens are counted. It runs beside the answering."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from gp_jax.errors import GlimpseError, TooLong
from gp_jax.inference.looks import plans_of
from gp_jax.inference.requests import Pruning, sampling_settings
from gp_jax.processing.layout import ARRAYS, read_samples
from gp_jax.pruning.plan import Plan
from gp_jax.serving import pictures
from gp_jax.serving.chat import Chat
from gp_jax.serving.errors import ApiError
from gp_jax.serving.jobs import Job, PictureKey
from gp_jax.serving.reading import Reader
from gp_jax.serving.settings import ServerSettings
from gp_jax.vlm import GlimpseVLM


def digest(image: Image.Image) -> bytes:
    """Of a picture's content: equal for equal pixels, however they were encoded."""
    return hashlib.sha256(b"%d %d " % image.size + image.tobytes()).digest()


class Preparation:
    """Turns requests into jobs. One thread tokenizes, since tokenizers are not safe in several."""

    def __init__(self, vlm: GlimpseVLM, settings: ServerSettings, reader: Reader, plans: frozenset[Plan]):
        """plans: those whose programs are compiled."""
        self.vlm, self.settings, self.reader, self.plans = vlm, settings, reader, plans
        own, most = vlm.processor, settings.max_visual_tokens
        self.processor = own.limited(most) if most is not None and own.shrinks else own
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="gp_jax-tokens")

    async def job(self, chat: Chat, deadline: float) -> Job:
        """The request as the answering thread takes it. deadline: of time.monotonic. Raises: ApiError."""
        try:
            pruning = self.vlm.resolve_shortest(chat.prune)
            plans = plans_of(self.vlm.glimpse_config, pruning)
        except GlimpseError as error:
            raise ApiError(400, f"prune: {error}", "prune") from None
        if not self.plans.issuperset(plans):
            raise ApiError(400, "this way to prune was not compiled when the server started (--methods)", "prune", "plan_not_served")
        images = [await pictures.read(url, self.settings, f"picture {k + 1}") for k, url in enumerate(chat.pictures)]
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.arrays, chat, pruning, images, deadline)

    def arrays(self, chat: Chat, pruning: Pruning, images: Sequence[Image.Image], deadline: float) -> Job:
        """Tokenizes, cuts pictures into patches, and looks whether the prompt fits."""
        try:
            for message in chat.messages:
                self.check_text(message)
            prompt = self.processor.render(chat.messages)
            plots = [self.processor.plot(*image.size) for image in images]
            self.check_length(prompt, sum(plot.rows.size for plot in plots))
            prepared = self.processor([list(images)], [prompt], max_image_pixels=self.settings.max_pixels, rendered=True)
            (sample,) = read_samples(self.vlm.config, *(prepared.inputs.get(name) for name in ARRAYS))
            self.reader.check(sample)
            keys = [PictureKey(digest(image), plot, self.areas(image)) for image, plot in zip(images, plots, strict=True)]
            noted = 2 if chat.top_logprobs else int(chat.logprobs)
            choice = sampling_settings(self.vlm.config, chat.temperature, chat.top_k, chat.top_p, chat.seed, "auto", noted=noted)
            return Job(sample, keys, pruning, choice, chat.max_new_tokens, deadline)
        except TooLong:
            raise self.too_long() from None
        except GlimpseError as error:
            raise ApiError(400, str(error), "messages") from None

    def areas(self, image: Image.Image) -> tuple[tuple[float, ...], ...]:
        """Per view the part of a picture that it covers; see `PictureKey`."""
        sides = (*image.size, *image.size)
        return tuple(tuple(edge / side for edge, side in zip(area, sides, strict=True)) for area in self.processor.areas(*image.size))

    def check_text(self, message: dict) -> None:
        """Raises: GlimpseError for a text that holds a picture's placeholder."""
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        for text in texts:
            if text.strip() and (why := self.processor.refusal(text)):
                raise GlimpseError(f"a message of the {message['role']} {why}")

    def check_length(self, prompt: str, visual: int) -> None:
        """Raises: ApiError before pictures are cut into patches, when the prompt is too long."""
        if len(self.processor.tokenize([prompt])[0]) + visual > self.settings.max_prompt:
            raise self.too_long()

    def too_long(self) -> ApiError:
        """The error for a prompt that does not fit."""
        most = self.settings.max_prompt
        message = f"the prompt is longer than {most} tokens, visual ones included (--max-prompt, --max-visual-tokens)"
        return ApiError(400, message, "messages", "context_length_exceeded")


def deadline_of(settings: ServerSettings) -> float:
    """When a request that begins now is given up, of time.monotonic."""
    return time.monotonic() + settings.timeout


def mask_of(job: Job, keep: np.ndarray, importance: np.ndarray) -> list[dict]:
    """Per picture (or view of one) which visual tokens stay, row by row, and how important each is in 0 .. 1, as float32 in its shortest
    decimals: rounded further, tokens at the threshold or at the cap could no longer be told apart."""
    found, first = [], 0
    views = [(number, area) for number, picture in enumerate(job.pictures) for area in picture.areas]
    for (rows, columns), (number, area) in zip(job.sample.grids, views, strict=True):
        part = slice(first, first + rows * columns)
        values = [float(str(value)) for value in importance[part].astype(np.float32)]
        own = dict(picture=number, area=[round(edge, 6) for edge in area], rows=rows, columns=columns)
        own |= dict(keep=keep[part].reshape(rows, columns).astype(int).tolist())
        found.append(own | dict(importance=[values[row * columns : (row + 1) * columns] for row in range(rows)]))
        first += rows * columns
    return found
