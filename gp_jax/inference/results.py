"""Results of requests: generations, answers, and their pictures."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from gp_jax.errors import GlimpseError, shown
from gp_jax.inference.engine import Engine, Prefilled
from gp_jax.inference.notebook import card
from gp_jax.processing.images import overlay, side_by_side
from gp_jax.processing.layout import FirstLook, Sample
from gp_jax.processing.looks import window_sizes
from gp_jax.processing.qwen import Prepared, Processor
from gp_jax.pruning.plan import Plan
from gp_jax.runtime.clock import COMPILE


@dataclass(frozen=True)
class Generation:
    """The result of `GlimpseVLM.generate` for B samples.

    tokens:         (B, n) int32 new tokens; padding after a sample's end, n is the longest sample's length.
    keep:           per sample (visual tokens,) bool in prompt order; all true without pruning.
    mask_logits:    per sample (visual tokens,) float32 importance logits (+-inf for reference masks); None without pruning.
    first_logits:   (B, vocabulary) float32, logits of the first new token.
    positions:      (axes, B, rows) int32 position ids of the rows that the last layers saw, left-padded with 1 as the released
                    code pads them.
    attention_mask: (B, rows) int32, 0 on that padding.
    seen, cached:   (B, layers) int, visual tokens that a decoder layer saw in prefill, and that its cache holds for decoding.
    viewed:         per sample (visual tokens,) bool: those that the vision tower saw; all true without a look.
    windows:        per sample and view, the visual tokens of each vision window that was seen.
    looks:          per sample the first look: its grids and the importance that it found; None: there was none.
    timings:        seconds per stage when asked for.
    """

    tokens: np.ndarray
    keep: list[np.ndarray]
    mask_logits: list[np.ndarray] | None
    first_logits: np.ndarray
    positions: np.ndarray
    attention_mask: np.ndarray
    seen: np.ndarray
    cached: np.ndarray
    viewed: list[np.ndarray]
    windows: list[tuple[tuple[int, ...], ...]]
    looks: list[FirstLook | None]
    timings: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        kept, total = sum(int(own.sum()) for own in self.keep), sum(own.size for own in self.keep)
        return f"Generation({self.tokens.shape[0]} x {self.tokens.shape[1]} tokens, {kept} of {total} visual tokens kept)"


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    kept, total: visual tokens after and before pruning; keep: per image (rows, columns) bool; images: upright RGB pictures;
    timings: seconds per stage (of the whole batch); seen, cached: per decoder layer, visual tokens that it saw in prefill and that its
    cache holds. viewed: per image (rows, columns) bool, what the vision tower saw; windows: per image, the visual tokens of each window
    that it saw; look: the first look, None: there was none.
    """

    text: str
    tokens: np.ndarray
    kept: int
    total: int
    keep: list[np.ndarray]
    images: list[Image.Image]
    timings: dict[str, float]
    seen: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    viewed: tuple[np.ndarray, ...] = ()
    windows: tuple[tuple[int, ...], ...] = ()
    look: FirstLook | None = None

    @property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """Where it was pruned: (last layer in front of the cut, visual tokens behind it), in order. A second look is none."""
        before = (sum(int(view.sum()) for view in self.viewed) if self.viewed else self.total, *self.seen)
        return tuple((layer - 1, now) for layer, (was, now) in enumerate(itertools.pairwise(before)) if was != now)

    @property
    def seconds(self) -> float:
        """Of the whole batch, without what only its first call cost."""
        return sum(seconds for stage, seconds in self.timings.items() if stage != COMPILE)

    def __repr__(self) -> str:
        return f"Answer({shown(self.text)}, {self.kept} of {self.total} visual tokens kept, {self.seconds:.2f} s)"

    def _repr_html_(self) -> str:
        """For notebooks: the overlay and the numbers."""
        stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in self.timings.items() if stage != COMPILE)
        facts = {"visual tokens": f"{self.kept} of {self.total} kept ({self.retention:.1%})", "seconds": stages}
        if self.timings.get(COMPILE):
            facts["first call"] = f"{self.timings[COMPILE]:.1f} s more, which later answers do not take"
        return card(self.text, facts, self.overlay())

    @property
    def retention(self) -> float:
        """Share of the visual tokens that the last layer still sees; 1.0 when there are none."""
        return self.kept / self.total if self.total else 1.0

    @property
    def seen_share(self) -> float:
        """Share of the visual tokens that the vision tower saw: of the picture, what the second look saw; 1.0 without a look."""
        return sum(int(view.sum()) for view in self.viewed) / self.total if self.total and self.viewed else 1.0

    @property
    def maps(self) -> list[np.ndarray]:
        """Per image (rows, columns) float32 in 0 .. 1: the importance that the first look found; none without one."""
        return split_tokens(1 / (1 + np.exp(-self.look.logits)), tuple(k.shape for k in self.keep)) if self.look else []

    def overlays(self) -> list[Image.Image]:
        """Every picture with its kept regions bright and the rest dimmed."""
        return [overlay(image, keep) for image, keep in zip(self.images, self.keep, strict=True)]

    def overlay(self) -> Image.Image | None:
        """One picture: the overlay, or all of them side by side; None for a question without images."""
        pictures = self.overlays()
        return None if not pictures else pictures[0] if len(pictures) == 1 else side_by_side(pictures)


def split_tokens(values: np.ndarray, grids: tuple[tuple[int, int], ...]) -> list[np.ndarray]:
    """Per-token values of a sample as one (rows, columns) array per image."""
    sizes = [rows * columns for rows, columns in grids]
    return [part.reshape(grid) for part, grid in zip(np.split(values, np.cumsum(sizes)[:-1]), grids, strict=True)] if grids else []


Scores = Sequence[tuple[np.ndarray, np.ndarray]]  # per cut: logits (B, M), keep (B, M), on the host


def per_token(scores: Scores, samples: Sequence[Sample]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Keep mask and importance logits of the last cut, per sample in prompt order; all kept, logits 0 without a cut. Whole pictures: what a
    second look did not see is not kept, with a logit of -inf."""
    if not scores:
        kept = [np.ones(sample.count, bool) for sample in samples]
        return on_grids(kept, [np.zeros(sample.count, np.float32) for sample in samples], samples)
    logits, keep = scores[-1]
    for number, sample in enumerate(samples):
        if np.isnan(logits[number, sample.slot_of_token]).any():
            raise GlimpseError(f"sample {number + 1} of {len(samples)}: the importance of its visual tokens is not a number")
    kept, importance = ([rows[b, sample.slot_of_token] for b, sample in enumerate(samples)] for rows in (keep, logits))
    return on_grids(kept, importance, samples)


def on_grids(
    keep: Sequence[np.ndarray], logits: Sequence[np.ndarray], samples: Sequence[Sample]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Values of the visual tokens that were seen as values of whole pictures: what was not seen is not kept, its importance is -inf."""
    kept = [sample.on_grids(own, False) for own, sample in zip(keep, samples, strict=True)]
    return kept, [sample.on_grids(own, -np.inf) for own, sample in zip(logits, samples, strict=True)]


def per_layer(plan: Plan, scores: Scores, samples: Sequence[Sample], layers: int) -> tuple[np.ndarray, np.ndarray]:
    """`seen` and `cached` of a Generation."""
    seen = np.repeat([[sample.count] for sample in samples], layers, axis=1)
    cached = seen.copy()
    for cut, (_, keep) in zip(plan, scores, strict=True):
        kept = keep[: len(samples)].sum(axis=1, keepdims=True)
        seen[:, cut.after + 1 :] = kept
        cached[:, 0 if cut.past else cut.after + 1 :] = kept
    return seen, cached


def answers_of(done: Generation, prepared: Prepared, processor: Processor) -> list[Answer]:
    """A batch's answers."""
    facts = zip(done.seen, done.cached, done.viewed, done.windows, done.looks, strict=True)
    rows = zip(done.tokens, done.keep, prepared.grids, prepared.images, facts, strict=True)
    return [
        Answer(
            text=processor.text(tokens),
            tokens=tokens,
            kept=int(keep.sum()),
            total=keep.size,
            keep=split_tokens(keep, grids),
            images=images,
            timings=done.timings,
            seen=tuple(seen.tolist()),
            cached=tuple(cached.tolist()),
            viewed=tuple(split_tokens(viewed, grids)),
            windows=windows,
            look=look,
        )
        for tokens, keep, grids, images, (seen, cached, viewed, windows, look) in rows
    ]


def outcome(engine: Engine, filled: Prefilled, pruned: bool) -> dict[str, Any]:
    """The fields of a Generation that prefill decides."""
    samples, stream = filled.batch.samples, filled.stream
    assert stream is not None, "only scores were asked for"
    scores, logits, positions, valid = engine.fetch((filled.scores, filled.logits, stream.positions, stream.valid))
    keep, mask_logits = per_token(scores, samples)
    seen, cached = per_layer(filled.batch.plan, scores, samples, len(stream.kv))
    lengths = valid[: len(samples)].sum(axis=1)
    padded = np.ones((positions.shape[0], len(samples), lengths.max()), np.int32)
    mask = np.zeros(padded.shape[1:], np.int32)
    for b, length in enumerate(lengths):
        padded[:, b, -length:] = positions[:, b, :length]
        mask[b, -length:] = 1
    return dict(
        keep=keep,
        mask_logits=mask_logits if pruned else None,
        first_logits=logits[: len(samples)],
        positions=padded,
        attention_mask=mask,
        seen=seen,
        cached=cached,
        viewed=[sample.on_grids(np.ones(sample.count, bool), False) for sample in samples],
        windows=[window_sizes(sample) for sample in samples],
        looks=[sample.first_look for sample in samples],
    )
