"""A server's answering thread on a tiny random model, without HTTP."""

import queue
import time

import numpy as np

from gp_jax.inference.requests import resolve, sampling_settings
from gp_jax.processing.layout import ARRAYS, read_samples
from gp_jax.processing.views import whole
from gp_jax.serving.jobs import Ended, Failed, Job, PictureKey, Started, Tokens


def job_of(vlm, raw: dict, prune=None, most: int = 8, temperature: float = 0.0, seed: int = 0, noted: int = 0, seconds: float = 600):
    """A request of a processor's output, and the queue of its events."""
    (sample,) = read_samples(vlm.config, *(raw.get(name) for name in ARRAYS))
    pictures, first = [], 0
    for grid in sample.grids:
        size = grid[0] * grid[1] * 4
        pictures.append(PictureKey(sample.pixels[first : first + size].tobytes(), whole(grid)))
        first += size
    pruning = resolve(prune, vlm.glimpse_config, vlm.config.text.num_hidden_layers)
    choice = sampling_settings(vlm.config, temperature, 0, 1.0, seed, "auto", noted=noted)
    job, events = Job(sample, pictures, pruning, choice, most, time.monotonic() + seconds), queue.Queue()
    job.deliver = events.put
    return job, events


def outcome(events: queue.Queue, timeout: float = 600) -> dict:
    """All that a request's receiver was told."""
    found: dict = dict(tokens=[], logprobs=[], best=[], parts=0)
    while True:
        event = events.get(timeout=timeout)
        if isinstance(event, Started):
            found["started"] = event
        elif isinstance(event, Tokens):
            found["tokens"] += event.ids.tolist()
            found["parts"] += 1
            found["logprobs"] += [] if event.logprobs is None else event.logprobs.tolist()
            found["best"] += [] if event.best is None else zip(*(x.tolist() for x in event.best), strict=True)
        elif isinstance(event, Ended):
            return found | dict(reason=event.reason, tokens=np.array(found["tokens"]))
        elif isinstance(event, Failed):
            return found | dict(failed=event, tokens=np.array(found["tokens"]))
