"""Two looks: the samples of a request as the second look sees them (see `pruning.look`, `processing.looks`).

    first looks -> see -> embed -> run(0, r) -> score -> windows -> second looks, which are samples like any others

A first look is an ordinary request at fewer visual tokens that ends with its scores, and a second look is an ordinary request too: both
take the programs and buckets that requests of their sizes take anyway.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.inference.engine import Engine
from gp_jax.inference.look_inputs import first_looks, seen_part, told_looks
from gp_jax.inference.requests import Pruning
from gp_jax.inference.results import per_token
from gp_jax.processing.layout import FirstLook, Sample
from gp_jax.processing.looks import present_windows, source_tokens, to_choose, windows_of_tokens
from gp_jax.pruning.look import Look, choose, look_limits
from gp_jax.pruning.plan import Plan, look_plan
from gp_jax.pruning.rule import Prune
from gp_jax.runtime.clock import Clock


def look_twice(engine: Engine, samples: Sequence[Sample], pruning: Pruning, clock: Clock | None = None) -> list[Sample]:
    """Samples as the second look sees them; unchanged without a look.

    Samples without a first look (text, small pictures) stay whole; so do those whose first look is unsure. Raises: GlimpseError, before any
    device work, for settings and sizes with which the whole samples could not be answered.
    """
    look, rule = pruning.look, pruning.rule
    if look is None or rule is None:
        return list(samples)
    engine.length(engine.batch(samples, pruning))
    if look.told:
        return told_looks(engine.config, samples, pruning)
    firsts, found = first_looks(engine.config, engine.glimpse_config, samples, look), []
    maps = importance(engine, [first for first in firsts if first is not None])
    for sample, first in zip(samples, firsts, strict=True):
        if first is not None:
            looked = dataclasses.replace(sample, first_look=FirstLook(first.grids, next(maps)[source_tokens(sample, first)]))
            sample = seen_part(engine.config, looked, rule, chosen_windows(engine.config, looked, look))
        found.append(sample)
    if clock is not None:
        clock.lap("look")
    return found


def plans_of(glimpse: GlimpseConfig | None, pruning: Pruning) -> tuple[Plan, ...]:
    """The plans that a request runs: that of its first look, where one is taken, and its own. Raises: GlimpseError without a glimpse."""
    looks = pruning.look is not None and not pruning.look.told
    return tuple(dict.fromkeys((*([look_plan(glimpse)] if looks else []), pruning.plan)))


def importance(engine: Engine, firsts: Sequence[Sample]) -> Iterator[np.ndarray]:
    """The importance logits of first looks, (visual tokens,) float32 each."""
    if not firsts:
        return iter(())
    batch = engine.batch(firsts, Pruning(look_plan(engine.glimpse_config), Prune()))
    return iter(per_token(engine.fetch(engine.prefill(batch, scores_only=True).scores), firsts)[1])


def window_scores(sample: Sample) -> np.ndarray:
    """(W,) float32: the largest importance logit of the first look in every window."""
    assert sample.first_look is not None, "a first look was taken"
    scores = np.full(len(sample.places), -np.inf, np.float32)
    np.maximum.at(scores, windows_of_tokens(sample), sample.first_look.logits)
    return scores


def chosen_windows(config: ModelConfig, sample: Sample, look: Look) -> np.ndarray:
    """(W,) bool: the windows that the first look of a sample chooses."""
    present = to_choose(config, sample) & present_windows(sample)
    return choose(window_scores(sample)[None], sample.places[None], present[None], look_limits(look, present.sum()[None]))[0]
