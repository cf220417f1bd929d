"""Checks a caller's settings and turns them into the arrays that the engine takes."""

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.config.schema import Count, FromNumpy, Several, TokenId, one
from gp_jax.errors import GlimpseError, shown
from gp_jax.processing.layout import Sample
from gp_jax.pruning.look import Look
from gp_jax.pruning.plan import SCORERS, Plan, make_plan, shares
from gp_jax.pruning.rule import Prune, anchor_indices, limits, reference_mask
from gp_jax.trees import KeepLimits, Sampling

AUTO = "auto"
VIDEO_HINT = ": only still images are supported"
EOS_MULTIPLE = 8  # end-of-sequence ids are padded to a multiple of this, so that their number does not change a program's shapes
GREEDY = 1e-30  # lower temperatures count as 0: logits divided by them overflow float32
Temperature = Annotated[float, Field(ge=0, le=1e12), FromNumpy]
TopP = Annotated[float, Field(ge=1e-6, le=1), FromNumpy]


@dataclass(frozen=True)
class CutInput:
    """A request's arrays for one cut. B is the batch bucket, M the bucket of vision slots."""

    limits: KeepLimits
    given: np.ndarray | None  # (B, M) float32 logits, for scorers that rank by them


class Pruning(NamedTuple):
    """What `prune` stands for: where to cut, and the keep rule (None: no pruning), which also says whether to look twice."""

    plan: Plan
    rule: Prune | None

    @property
    def look(self) -> Look | None:
        """How the parts of pictures are chosen that are seen; None: pictures are seen whole."""
        return self.rule.look if self.rule else None


@dataclass(frozen=True)
class Batch:
    """Requests that run together, as the programs take them."""

    samples: Sequence[Sample]
    plan: Plan
    cuts: Sequence[CutInput]  # one per cut of the plan
    next_positions: np.ndarray  # (size,) int32: position of every sample's first new token, 0 on samples that only fill the bucket
    size: int  # bucket of samples
    slots: int  # bucket of vision slots M; 0 when no sample has an image


def resolve(prune: Prune | str | None, glimpse: GlimpseConfig | None, depth: int) -> Pruning:
    """The plan behind `prune`; "auto" means the settings in the glimpse's config, or none without a glimpse. depth: decoder layers."""
    if isinstance(prune, str) and prune == AUTO:
        prune = Prune.from_config(glimpse) if glimpse else None
    if prune is None:
        return Pruning((), None)
    if not isinstance(prune, Prune):
        raise GlimpseError(f"prune must be a Prune, None or 'auto', not {shown(prune)}")
    return Pruning(make_plan(prune, glimpse, depth), prune)


def make_batch(samples: Sequence[Sample], pruning: Pruning, size: int, slots: int) -> Batch:
    """Samples in buckets of `size` samples and `slots` vision slots. Raises: GlimpseError, see `keep_rules`."""
    plan, rule = pruning if slots else Pruning((), pruning.rule)  # without an image there is nothing to prune
    positions = np.zeros(size, np.int32)
    positions[: len(samples)] = next_positions(samples, rule)
    return Batch(samples, plan, keep_rules(samples, plan, rule, size, slots), positions, size, slots)


def keep_rules(samples: Sequence[Sample], plan: Plan, prune: Prune | None, batch: int, slots: int) -> list[CutInput]:
    """The keep rule's numbers for every cut, padded to `batch` samples of `slots` vision slots.

    Raises: GlimpseError on prompts that end with an image, anchors on several images, or reference masks that do not fit.
    """
    if not plan or prune is None:
        return []
    for i, sample in enumerate(samples):
        if sample.image_token[-1] >= 0:
            raise GlimpseError(f"input_ids[{i}] ends with an image token; pruning needs a prompt that ends with text")
    masks = prune.reference_masks
    if masks is not None and len(masks) != len(samples):
        raise GlimpseError(f"reference_masks holds {len(masks)} masks for {len(samples)} samples")
    if isinstance(prune.fixed_remain_ratio, tuple) and len(prune.ratios) != len(samples):
        raise GlimpseError(f"fixed_remain_ratio holds {len(prune.ratios)} shares for {len(samples)} samples")
    exact = masks is not None or prune.method == "nothing"
    rule = Prune(min_remain_num=None) if exact else prune  # a given mask is kept as it is
    counts, totals, always = np.zeros(batch, int), np.zeros(batch, int), np.zeros((batch, slots), bool)
    given = np.full((batch, slots), -np.inf, np.float32)
    for b, sample in enumerate(samples):
        counts[b], totals[b] = sample.count, sample.total
        anchors = np.isin(sample.tokens, anchor_indices(rule.anchor_positions, sample.grids))
        always[b, sample.slot_of_token[anchors]] = True
        if prune.method == "random":  # of the sample, not of its place in a batch
            random = np.random.default_rng([prune.seed, zlib.crc32(sample.ids.tobytes()), zlib.crc32(sample.pixels.tobytes())])
            given[b, sample.slot_of_token] = random.random(sample.total)[sample.tokens]
        if masks is not None:
            kept = reference_mask(masks[b], sample.grids, f"reference_masks[{b}]")
            given[b, sample.slot_of_token[kept[sample.tokens]]] = np.inf
    rules = [dataclasses.replace(rule, fixed_remain_ratio=own) for own in shares(rule, plan)]
    return [
        CutInput(limits(own, totals, always, counts), given if SCORERS[cut.scorer].given else None)
        for cut, own in zip(plan, rules, strict=True)
    ]


def next_positions(samples: Sequence[Sample], prune: Prune | None) -> list[int]:
    """Per sample the position of its first new token."""
    positions = [sample.next_position for sample in samples]
    return [positions[-1]] * len(samples) if prune and prune.released_batch_positions else positions


def ending(tokens: Sequence[int]) -> np.ndarray:
    """Tokens that end a row as an array of few possible sizes: padded with -1, which no token is."""
    padded = np.full(-(-max(len(tokens), 1) // EOS_MULTIPLE) * EOS_MULTIPLE, -1, np.int32)
    padded[: len(tokens)] = tokens
    return padded


def sampling_settings(
    config: ModelConfig,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    eos_token_id: int | Sequence[int] | str | None,
    rows: int = 1,
    noted: int = 1,
) -> Sampling:
    """Checked sampling settings as arrays of `rows` rows, numbered from 0. eos_token_id: "auto" for the checkpoint's, None for none; noted:
    where the rows have room for them, 1 notes log-probabilities, 2 those of the best tokens too."""
    temperature, top_p = one(Temperature, temperature, "temperature"), one(TopP, top_p, "top_p")
    top_k, seed = one(Count, top_k, "top_k"), one(Count, seed, "seed")
    if isinstance(eos_token_id, str) and eos_token_id == AUTO:
        ends = config.eos_token_ids
    elif isinstance(eos_token_id, list | tuple | np.ndarray):
        ends = one(Several[TokenId], eos_token_id, "eos_token_id")
    else:
        ends = () if eos_token_id is None else (one(TokenId, eos_token_id, "eos_token_id"),)
    return Sampling(
        temperature=np.full(rows, temperature if temperature >= GREEDY else 0, np.float32),
        top_k=np.full(rows, top_k, np.int32),
        top_p=np.full(rows, top_p, np.float32),
        seed=np.full(rows, seed, np.int32),
        number=np.arange(rows, dtype=np.int32),
        noted=np.full(rows, noted, np.int32),
        eos=ending(ends),
        pad=np.int32(config.pad_token_id),
    )


def check_names(function: str, unknown: Iterable[str]) -> None:
    """Raises: GlimpseError that names arguments that a function does not take."""
    if unknown := sorted(unknown):
        raise GlimpseError(f"{function} does not take {', '.join(unknown)}{VIDEO_HINT if any('video' in k for k in unknown) else ''}")
