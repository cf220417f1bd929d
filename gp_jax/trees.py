"""Pytrees that are passed between jitted programs. Every field has its shape in a comment.

B samples, S vision patches of a sample, M = S / merge_unit vision slots (one visual token or padding each), T rows of the stream,
A position axes (3 under M-RoPE), D decoder width, C ViT width, N query heads, K key-value heads, H head width, R image windows.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.tree_util import register_dataclass

Array: TypeAlias = Any  # of JAX or numpy, or its shape or sharding: the leaves of one tree are each of these on their way


@register_dataclass
@dataclass(frozen=True)
class VisionInput:
    """Patches of every sample in window order, windows packed into blocks of equal size (see `processing.windows`)."""

    patches: Array | None  # (B, S, patch_dim) float
    patch_hw: Array  # (B, S, 2) int: row and column in the patch grid of its image
    patch_window: Array  # (B, S) int: window number inside the sample, -1 padding
    patch_image: Array  # (B, S) int: image number inside the sample, -1 padding
    token_hw: Array  # (B, M, 2) int: row and column in the merged grid of its image
    token_window: Array  # (B, M) int
    token_image: Array  # (B, M) int, -1 padding
    token_sides: Array  # (B, M, 2) int: rows and columns of the merged grid of its whole image

    def without_pixels(self) -> "VisionInput":
        """The same without its pixels: only the tower reads them, and they are the largest input, so they are freed early."""
        return dataclasses.replace(self, patches=None)


@register_dataclass
@dataclass(frozen=True)
class VisionFeatures:
    """Output of the vision tower in vision slot order: visual tokens, conditions of the predictor, recorded attention and keys."""

    tokens: Array  # (B, M, D)
    conditions: tuple[Array, ...]  # each (B, M, C), in the order of `selected_visual_layers`; empty without a glimpse
    received: dict[int, Array] = dataclasses.field(default_factory=dict)  # block -> (B, M) attention a token receives, mean of its patches
    keys: dict[int, Array] = dataclasses.field(default_factory=dict)  # block -> (B, M, H) keys after rope, mean of patches and heads
    line_break: Array | None = None  # (D,) embedding of the line breaks among a picture's prompt rows (LLaVA-NeXT)
    deepstack: tuple[
        Array, ...
    ] = ()  # each (B, M, D): what the first decoder layers, one after the other, add to visual tokens (DeepStack)


@register_dataclass
@dataclass(frozen=True)
class PromptInput:
    """Prompts, left-aligned, with glimpse rows behind the last prompt row."""

    ids: Array  # (B, T) int
    positions: Array  # (A, B, T) int
    valid: Array  # (B, T) bool: glimpse rows are valid, padding is not
    image_slot: Array  # (B, T) int: vision slot of an image token, -1 elsewhere
    glimpse_row: Array  # (B, T) int: 0 .. le_length - 1 on glimpse rows, -1 elsewhere
    tap_row: Array  # (B,) int: the row whose queries are tapped (the last glimpse row)


@register_dataclass
@dataclass(frozen=True)
class TailInput:
    """What follows a prompt in training: the lead (the glimpse rows, or the last prompt token if there are none), then the answer.
    U lead and answer rows."""

    ids: Array  # (B, U) int: answer tokens; a placeholder on glimpse rows
    positions: Array  # (A, B, U) int
    valid: Array  # (B, U) bool
    targets: Array  # (B, U) int: the token that this row must predict, -1: none


@register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """Prompts (without glimpse rows), their answers and the reference masks."""

    vision: VisionInput
    prompt: PromptInput
    tail: TailInput
    reference: Array  # (B, M) bool: vision slots that hold the evidence
    known: Array  # (B, M) bool: vision slots of which is known whether they do; others have no part in the losses
    number: Array  # (B,) int: number of the sample in its step (the seed of its dropout), -1 padding


@register_dataclass
@dataclass(frozen=True)
class TurnsInput:
    """Several turns (question, answer) behind one shared prompt that ends with the picture; no turn sees another. U rows of all turns,
    Q turns, M vision slots. `keep` and `cut` imitate pruning after some layer: they hide the pruned tokens."""

    ids: Array  # (B, U) int
    positions: Array  # (A, B, U) int: every turn goes on behind the prompt
    turn: Array  # (B, U) int: number of the turn, -1 padding
    generated: Array  # (B, U) bool: rows of answer tokens, which generation feeds after the cut
    targets: Array  # (B, U) int: the token that this row must predict, -1: none
    family: Array  # (B, Q) int: kind of question, -1 padding
    keep: Array  # (B, Q, M) bool: visual tokens that a turn still sees behind its cut
    seen: Array  # (B, M) bool: visual tokens that visual tokens still see behind the cut
    cut: Array  # (B,) int: first layer behind the cut; the depth: nothing is cut


@register_dataclass
@dataclass(frozen=True)
class DenseLabels:
    """Labels of what is drawn at each patch, -1: unknown. P = merge_unit, patches per visual token."""

    patch: Array  # (B, M, P, 3) int: kind, color and fill
    neighbor: Array  # (B, M, 4, 2) int: kind and color of the neighbor to the left, right, above and below
    beside: Array  # (B, Q, 4, 2) int: the same around the shape that a question about a relation names
    row: Array  # (B, Q) int: last row of a question, 0 for padding


@register_dataclass
@dataclass(frozen=True)
class PackedBatch:
    """Pictures with several turns each, to train a whole model."""

    vision: VisionInput
    prompt: PromptInput  # up to the picture's end
    turns: TurnsInput
    labels: DenseLabels


@register_dataclass
@dataclass(frozen=True)
class LayerKV:
    """Keys and values of one layer; `valid` says which slots hold a token."""

    key: Array  # (B, K, T, H), after rope
    value: Array  # (B, K, T, H)
    valid: Array  # (B, T) bool


@register_dataclass
@dataclass(frozen=True)
class Stream:
    """A prompt on its way through the decoder."""

    hidden: Array  # (B, T, D)
    positions: Array  # (A, B, T) int
    valid: Array  # (B, T) bool
    image_slot: Array  # (B, T) int, -1: not an image token
    glimpse_row: Array  # (B, T) int, -1: not a glimpse row
    tap_row: Array  # (B,) int
    kv: tuple[LayerKV, ...]  # layers already run
    taps: dict[int, Array]  # layer -> (B, T, N) glimpse logits on every row
    deepstack: dict[int, Array] = dataclasses.field(default_factory=dict)  # layer not yet run -> (B, M, D), added behind it by vision slot


@register_dataclass
@dataclass(frozen=True)
class KeepLimits:
    """The keep rule of a cut as numbers, computed on the host (exact integer arithmetic, no recompilation)."""

    threshold: Array  # () float: keep probabilities above it
    cap_trigger: Array  # (B,) int: more kept than this ...
    cap: Array  # (B,) int: ... and only this number of them stays, the best
    floor: Array  # (B,) int: at least this number stays, the best
    fixed: Array  # (B,) int: exactly this number stays, the best; -1: off
    always: Array  # (B, M) bool: slots that always stay (anchors)


@register_dataclass
@dataclass(frozen=True)
class LookLimits:
    """The rule by which a first look chooses windows as numbers (see `pruning.look`). Importance as logits."""

    threshold: Array  # (B,) float: choose windows above it
    sure: Array  # (B,) float: without a window of at least this the whole picture is seen; NaN: off, the best `cap` windows are
    margin: Array  # (B,) int: neighbours up to this number of windows away are chosen too
    floor: Array  # (B,) int: choose at least this number, the best
    cap: Array  # (B,) int: more than this is the whole picture


@register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How every row chooses its tokens. Temperature 0 is greedy; top_k 0 and top_p 1 are off. A draw depends on seed, number and step,
    not on the place of the row."""

    temperature: Array  # (R,) float
    top_k: Array  # (R,) int
    top_p: Array  # (R,) float
    seed: Array  # (R,) int
    number: Array  # (R,) int: tells continuations with one seed apart
    noted: Array  # (R,) int: where the state has room, 1 notes log-probabilities, 2 those of the best tokens too; 0: none
    eos: Array  # (E,) int, -1: unused
    pad: Array  # () int: written after the end


@register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Prompts that were read, for several continuations to share."""

    kv: tuple[LayerKV, ...]  # per layer (B, K, T, H); layers in front of a cut that leaves their cache alone are longer
    logits: Array  # (B, V) float32 of the first new token
    next_position: Array  # (B,) int: its position on every axis


@register_dataclass
@dataclass(frozen=True)
class MaskedPrompt:
    """Prompts whose visual tokens to keep are given."""

    vision: VisionInput | None  # without pixels; None: no sample has an image
    features: VisionFeatures | None
    prompt: PromptInput
    given: Array  # (B, M) float32: +inf on vision slots to keep, -inf on others
    limits: "KeepLimits"
    next_position: Array  # (B,) int: position of the first new token


@register_dataclass
@dataclass(frozen=True)
class Completions:
    """Answers to prompts, G of each, left-aligned."""

    ids: Array  # (B, G, C) int
    valid: Array  # (B, G, C) bool: a prefix of every row


@register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that changes while tokens are generated. R rows. The prompts' caches are not part of it, because they are only read: of P
    prompts, prompt p belongs to the rows p R / P, ..., (p + 1) R / P - 1.

    The new cache is a ring buffer. All rows write to the same slot, `cursor`, which advances by one per step and wraps around. The
    tokens of a row that has written w of them are in the last w slots, so rows may start at different steps, and a new row need not
    clear the cache.
    """

    tokens: Array  # (R, n) int
    step: Array  # (R,) int: tokens of the row
    limit: Array  # (R,) int: as many at most
    done: Array  # (R,) bool; free rows are done
    broken: Array  # (R,) bool: its logits were not finite at some token
    last: Array  # (R,) int: the newest token
    next_position: Array  # (R,) int: its position on every axis
    cursor: Array  # () int: the slot that the next token writes to
    new_kv: tuple[tuple[Array, Array], ...]  # per layer keys and values of new tokens, (R, K, n, H) each
    logprobs: tuple[Array, Array] | None  # (R, n) float32 each: of the distribution that was drawn from, of the full softmax
    best: tuple[Array, Array] | None  # (R, n, b): the best tokens, int32, and their log-probabilities in the full softmax, float32

    @property
    def written(self) -> Array:
        """(R, n) bool: slots of the new cache that hold a row's own tokens, the newest in `cursor` among them."""
        slots = self.tokens.shape[1]
        age = (self.cursor - jnp.arange(slots)) % slots  # steps since each slot was written
        return age < self.step[:, None]
