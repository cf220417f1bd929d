"""Reads prompts, one at a time, while rows go on generating: between any two programs of a prefill a step may be taken."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gp_jax.buckets import Ladders
from gp_jax.inference.engine import Engine, View
from gp_jax.inference.looks import look_twice
from gp_jax.inference.requests import Batch
from gp_jax.inference.results import per_token
from gp_jax.inference.shared_programs import Parts, Programs
from gp_jax.processing.layout import Sample, picture_samples, vision_input
from gp_jax.serving.jobs import Job, Started
from gp_jax.serving.vision_cache import VisionCache, paste, sources
from gp_jax.trees import Prefix, VisionFeatures


class GivingWay(Parts):
    """Programs behind each of which `between` is called with what it gave."""

    def __init__(self, mesh: Mesh | None, programs: Programs, between: Callable[[Any], None]):
        super().__init__(mesh, programs)
        self.between = between

    def __call__(self, function: Callable, *args: Any, **options: Any) -> Any:
        result = super().__call__(function, *args, **options)
        self.between(result)
        return result


@dataclass
class Read:
    """A prompt that was read and waits for a place."""

    job: Job
    prefix: Prefix
    started: Started


class Reader:
    """Prefill of requests. seconds: spent in first looks, in the tower and behind it, `away` excluded."""

    def __init__(self, engine: Engine, ladders: Ladders, cache: VisionCache, between: Callable[[Any], None], away: Callable[[], float]):
        """engine: of the rows, with the same programs; between: see `GivingWay`; away: seconds that were spent in `between` so far."""
        self.engine = Engine(engine.model, ladders, engine.mesh, engine.attention, GivingWay(engine.mesh, engine.call.programs, between))
        self.cache, self.away = cache, away
        self.seconds = {"look": 0.0, "vision": 0.0, "prefill": 0.0}

    def check(self, sample: Sample) -> None:
        """Raises: GlimpseError when a prompt is too long for the ladders."""
        rows = self.engine.glimpse_rows
        self.engine.ladders.prompt.fit(sample.ids.size + rows)
        self.engine.vision_slots([sample])

    def read(self, job: Job) -> Read:
        """Everything up to the first token's logits. Raises: what `Job.check` raises between programs; GlimpseError."""
        start, away, hits = time.perf_counter(), self.away(), self.cache.hits
        (sample,) = look_twice(self.engine, [job.sample], job.pruning)
        start, away = self._note("look", start, away)
        batch = self.engine.batch([sample], job.pruning)
        whole = sample.count == job.sample.count
        view = self.view(job, batch) if whole else self.engine.view(batch)  # the cache holds whole pictures
        jax.block_until_ready(view)
        start, away = self._note("vision", start, away)
        filled = self.engine.prefill(batch, view=view)
        prefix = self.engine.prefix(filled)
        scores = self.engine.fetch(filled.scores)
        (keep,), (logits,) = per_token(scores, [sample])
        jax.block_until_ready(prefix)
        self._note("prefill", start, away)
        with np.errstate(over="ignore"):
            importance = 1 / (1 + np.exp(-logits.astype(np.float64))) if scores else keep
        started = Started(keep, importance.astype(np.float32), self.cache.hits - hits, len(job.pictures), sample.count)
        return Read(job, prefix, started)

    def _note(self, stage: str, start: float, away: float) -> tuple[float, float]:
        now, gone = time.perf_counter(), self.away()
        self.seconds[stage] += now - start - (gone - away)
        return now, gone

    def view(self, job: Job, batch: Batch) -> View | None:
        """What the tower sees, from the cache where it is there."""
        if not batch.slots:
            return None
        if len(job.pictures) == 1:
            alone = [job.sample]
        else:
            alone = picture_samples(self.engine.config, job.sample, [picture.plot for picture in job.pictures])
        watch, found = self.engine.watch(batch.plan), []
        for picture, sample in zip(job.pictures, alone, strict=True):
            features = self.cache.get((picture.digest, watch))
            if features is None:
                features = self.see(sample, watch)
                self.cache.put((picture.digest, watch), features)
            found.append(features)
        vision = vision_input([job.sample], self.engine.config, batch.size, batch.slots).without_pixels()
        page = found[0]
        if len(found) > 1:
            page = self.pasted(found, sources(job.sample, alone, batch.slots))
        return View(self.engine.split(vision, batch.size), page)

    def see(self, sample: Sample, watch: tuple[int, ...]) -> VisionFeatures:
        """The tower on one picture."""
        vision = vision_input([sample], self.engine.config, 1, self.engine.vision_slots([sample]))
        return self.engine.see(self.engine.split(vision, 1), watch=watch)

    def pasted(self, found: list[VisionFeatures], source: list[np.ndarray]) -> VisionFeatures:
        """Features of several pictures in the order of a prompt's slots."""
        page = None
        for features, own in zip(found, source, strict=True):
            page = self.engine.call(paste, page, features, self.engine.place(own), slots=own.size)
        assert page is not None, "a prompt with pictures"
        return page
