"""Looks on the host: first looks, windows that a request gives, and both as the traced function takes them.

B samples, T prompt rows, M vision slots, W windows.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gp_jax.buckets import Ladder, Ladders
from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.inference.requests import Pruning
from gp_jax.processing.layout import Sample, prompt_input, slots_of, vision_input
from gp_jax.processing.looks import (
    FEWER,
    FirstSize,
    always_windows,
    check_parts,
    first_look,
    line_of_rows,
    present_windows,
    second_look,
    source_tokens,
    to_choose,
    windows_of_tokens,
)
from gp_jax.pruning.look import Look, look_limits
from gp_jax.pruning.plan import look_plan
from gp_jax.pruning.rule import Prune, anchor_indices, reference_mask

PREFIX = "look_"
SPARE = 8  # windows more than a picture of windows of one row each would have, for pictures that are smaller than a window

LOOK_INPUTS = {
    "look_source": "(B, M) int32: for the visual token in a vision slot the slot of the first look that shows its middle, -1: none",
    "look_places": "(B, W, 3) int32: view, row and column of every attention window of the pictures",
    "look_choose": "(B, W) bool: the windows that the first look chooses from; none: the sample is seen whole",
    "look_always": "(B, W) bool: windows that are seen anyway",
    "look_line": "(B, T) int32: line of the picture that a prompt row belongs to, where lines end with a break; -1: none",
    "look_threshold": "(B,) float32: choose windows with an importance logit above it",
    "look_sure": "(B,) float32: without a window of at least this logit the pictures are seen whole; NaN: off",
    "look_margin": "(B,) int32: neighbours up to this number of windows away are chosen too",
    "look_floor": "(B,) int32: choose at least this number of windows, the best",
    "look_cap": "(B,) int32: with more than this number the pictures are seen whole",
}


@dataclass(frozen=True)
class FirstBuckets:
    """Static sizes of a first look. slots, prompt: rungs, of which the last are the capacity; windows: of the pictures."""

    slots: tuple[int, ...]
    prompt: tuple[int, ...]
    windows: int


def first_buckets(config: ModelConfig, look: Look | None, buckets: Ladders) -> FirstBuckets | None:
    """Sizes that hold the first look of everything that the buckets hold, and smaller ones for the look's own share. None: no first look
    is taken. Raises: GlimpseError when pictures have no parts."""
    if look is not None:
        check_parts(config)
    if look is None or look.told:
        return None
    vision, slots, rows = config.vision, slots_of(buckets.patches.rungs[-1], config), buckets.prompt.rungs[-1]
    tile = vision.window_side**2
    if vision.overviews:
        most = [max(tile, slots // FEWER // tile * tile)]
    else:
        most = [min(slots, max(tile, vision.slots_for(size))) for size in (int(look.share * slots), slots // FEWER)]
    text = rows - min(slots, rows) + 64
    prompt = {min(rows, -(-(int(look.share * rows) + text) // 16) * 16), rows}
    return FirstBuckets(tuple(sorted(set(most))), tuple(sorted(prompt)), slots // vision.window_side + SPARE)


def first_looks(config: ModelConfig, glimpse: GlimpseConfig | None, samples: Sequence[Sample], look: Look) -> list[Sample | None]:
    """The first look of every sample; None for those that are seen whole. Raises: GlimpseError when there can be none."""
    look_plan(glimpse)
    for i, sample in enumerate(samples):
        if sample.image_token[-1] >= 0:
            raise GlimpseError(f"input_ids[{i}] ends with an image token; a look needs a prompt that ends with text")
    return [first_look(config, sample, FirstSize(look.share, look.tokens, look.least)) for sample in samples]


def told_looks(config: ModelConfig, samples: Sequence[Sample], pruning: Pruning) -> list[Sample]:
    """The second looks where no first one is taken. Raises: GlimpseError when masks do not fit, or pictures have no parts."""
    look, rule = pruning.look, pruning.rule
    assert look is not None and look.told and rule is not None, "windows are known"
    check_parts(config)
    if look.windows is not None and len(look.windows) != len(samples):
        raise GlimpseError(f"look.windows holds {len(look.windows)} masks for {len(samples)} samples")
    return [seen_part(config, sample, rule, told_windows(config, sample, look, number)) for number, sample in enumerate(samples)]


def told_windows(config: ModelConfig, sample: Sample, look: Look, number: int) -> np.ndarray:
    """(W,) bool: the windows that the request's mask touches, or random ones, which depend on the sample and not on its place."""
    if look.random is not None:
        there = np.flatnonzero(present_windows(sample) & to_choose(config, sample))
        rng = np.random.default_rng([look.random, zlib.crc32(sample.ids.tobytes()), zlib.crc32(sample.pixels.tobytes())])
        some = rng.permutation(there)[: look_limits(look, np.array([there.size])).floor[0]]
        return np.isin(np.arange(len(sample.places)), some)
    mask = None if look.windows is None else look.windows[number]
    if mask is None:
        return present_windows(sample)
    touched = windows_of_tokens(sample)[reference_mask(mask, sample.grids, f"look.windows[{number}]")]
    return np.bincount(touched, minlength=len(sample.places)) > 0


def seen_part(config: ModelConfig, sample: Sample, rule: Prune, seen: np.ndarray) -> Sample:
    """A sample's second look at these windows and those that are always seen. seen: (W,) bool."""
    seen = seen | always_windows(config, sample, anchor_indices(rule.anchor_positions, sample.grids))
    return sample if (seen | ~present_windows(sample)).all() else second_look(config, sample, seen)


def look_inputs(
    samples: Sequence[Sample], config: ModelConfig, glimpse: GlimpseConfig | None, pruning: Pruning, buckets: Ladders, rows: int
) -> dict[str, np.ndarray]:
    """What the traced function takes for a look (see LOOK_INPUTS), padded. rows: glimpse rows of the whole samples' prompts.

    Raises: GlimpseError when pictures cannot be looked at twice; TooLong when they have too many windows.
    """
    look, rule = pruning.look, pruning.rule
    first = first_buckets(config, look, buckets)
    assert look is not None and rule is not None and first is not None, "a look is taken"
    batch, length, slots = buckets.batch.rungs[-1], buckets.prompt.rungs[-1], slots_of(buckets.patches.rungs[-1], config)
    firsts = first_looks(config, glimpse, samples, look)
    source, line = np.full((batch, slots), -1, np.int32), np.full((batch, length), -1, np.int32)
    places, choose, always = np.zeros((batch, first.windows, 3), np.int32), *np.zeros((2, batch, first.windows), bool)
    for b, (sample, small) in enumerate(zip(samples, firsts, strict=True)):
        count = len(sample.places)
        Ladder("windows", (first.windows,)).fit(max(1, count))
        places[b, :count] = sample.places
        line[b, : sample.ids.size] = line_of_rows(config, sample)
        present = present_windows(sample)
        always[b, :count] = always_windows(config, sample, anchor_indices(rule.anchor_positions, sample.grids))
        if small is None:
            always[b, :count] |= present
            continue
        choose[b, :count] = present & to_choose(config, sample)
        source[b, sample.slot_of_token] = small.slot_of_token[source_tokens(sample, small)]
        Ladder("patches", (first.slots[-1],)).fit(small.slots.size)
    arrays: dict[str, Any] = dict(source=source, places=places, choose=choose, always=always, line=line)
    arrays |= as_dict(look_limits(look, choose.sum(axis=1)))
    own_rows = glimpse.rows if glimpse else 0
    arrays |= as_dict(vision_input(firsts, config, batch, first.slots[-1]))
    arrays |= as_dict(prompt_input(firsts, config, batch, first.prompt[-1], own_rows))
    arrays["positions"] = np.moveaxis(arrays["positions"], 0, 1)
    return {PREFIX + name: value for name, value in arrays.items()}


def as_dict(tree: Any) -> dict[str, np.ndarray]:
    """A dataclass of arrays as a dict of numpy arrays."""
    return {f.name: np.asarray(getattr(tree, f.name)) for f in fields(tree)}
