"""Log-probabilities of completions under pruning, in one differentiable pass.

    exact:    prompt -> run(0, r) -> cut -> run(r, L) -> completion rows behind the kept caches of all layers: the distribution that
              `generate` samples from
    released: the first token so (the reference's first token unpruned); all others with the visual tokens cut before layer 0, as the
              released trainer computes them, which is another policy than the one that it samples from (docs/plus.md)

B prompts, G completions of each, C tokens of a completion, T prompt rows, M vision slots, D decoder width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gp_jax.config.choices import check_choice
from gp_jax.config.schema import one
from gp_jax.errors import GlimpseError
from gp_jax.inference.engine import Engine, View
from gp_jax.inference.requests import Batch, Pruning, Temperature
from gp_jax.inference.walk import Route, Scores, Stages
from gp_jax.models.decoder import Decoder, Layer, behind
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import at_once
from gp_jax.ops.slices import in_slices
from gp_jax.processing.layout import Sample
from gp_jax.processing.views import numeric
from gp_jax.pruning.plan import Plan
from gp_jax.pruning.rule import reference_mask
from gp_jax.pruning.scorers.scorer import Cut
from gp_jax.sharding import constrained
from gp_jax.trees import Completions, LayerKV, MaskedPrompt, Prefix, Stream, VisionFeatures, VisionInput

T = TypeVar("T")
LOGITS_BYTES = 128 << 20  # of the logits that are held at a time
EXACT, RELEASED = "exact", "released"
MODES = (EXACT, RELEASED)


@dataclass(frozen=True)
class FixedLength:
    """A `walk.Choice` for masks that are known beforehand: the rows that stay fit a length that the host has chosen."""

    length: int

    def rungs(self, need: Array, length: int) -> Sequence[int]:
        """That length."""
        return (min(self.length, length),)

    def branch(self, need: Array, rungs: Sequence[int], rest: Callable[[int], T]) -> T:
        """Goes on with it."""
        return rest(rungs[0])


def remembered(function: Callable, *args: Any, donate: tuple[int, ...] = (), **static: Any) -> Any:
    """Calls a function directly (see `ops.layers.at_once`), which the backward pass calls again: of a layer only the input is stored.

    (`ops.layers.rematerialised` stores matrix products too: 0.4 MB per row and layer of a 7B model with an adapter, whose gradient, unlike
    a glimpse's, reaches all rows of the prompt.)
    """
    own = args[: bool(args) and isinstance(args[0], nnx.Module)]
    return jax.checkpoint(lambda *rest: function(*own, *rest, **static))(*args[len(own) :])


def pick(vision: VisionInput, features: VisionFeatures, rows: Array, slots: int) -> View:
    """Some samples of a view, in fewer vision slots. rows: (b,) int; slots: static."""
    unit = vision.patch_hw.shape[1] // vision.token_hw.shape[1]
    values: dict[str, Any] = {"patches": None}
    for field in dataclasses.fields(vision)[1:]:
        length = slots * unit if field.name.startswith("patch_") else slots
        values[field.name] = constrained(getattr(vision, field.name)[rows, :length], "batch")
    tokens, *deepstack = (constrained(part[rows, :slots], "batch") for part in (features.tokens, *features.deepstack))
    picked: dict[str, Any] = dict(tokens=tokens, deepstack=tuple(deepstack), conditions=(), received={}, keys={})
    return View(VisionInput(**values), dataclasses.replace(features, **picked))


def masked_prompt(
    engine: Engine, batch: Batch, masks: Sequence[np.ndarray], view: View | None, rows: Sequence[int], size: int
) -> tuple[MaskedPrompt, int]:
    """Some prompts of a batch, in shapes that fit them.

    Args: masks: per sample of the batch (N,) bool, what stays of its visual tokens; view: of the batch; rows: the samples' places in it;
        size: of the result, whose other samples are empty.
    Returns: the prompts, and the length that holds the longest of them behind the cut.
    """
    samples, ladders = [batch.samples[row] for row in rows], engine.ladders
    length = ladders.prompt.fit(max(sample.ids.size for sample in samples))
    staying = [sample.ids.size - int((~masks[row]).sum()) for sample, row in zip(samples, rows, strict=True)]
    places = np.array([*rows, *[rows[0]] * (size - len(rows))], np.int32)
    slots, vision, features = engine.vision_slots(samples), None, None
    if slots and view is not None:
        vision, features = engine.call(pick, view.vision, view.features, engine.place(places), slots=slots)
    given: Any = np.zeros((size, slots), np.float32)
    limits: Any = None
    if batch.cuts:
        cut = batch.cuts[0]
        assert cut.given is not None, "masks are given"
        own = {name: getattr(cut.limits, name)[places] for name in ("cap_trigger", "cap", "floor", "fixed")}
        given, limits = cut.given[places, :slots], dataclasses.replace(cut.limits, always=cut.limits.always[places, :slots], **own)
    position = np.zeros(size, np.int32)
    position[: len(rows)] = batch.next_positions[list(rows)]
    given, limits, position = engine.split((given, limits, position), size)
    prompt = engine.prompt(samples, size, length, 0)
    return MaskedPrompt(vision, features, prompt, given, limits, position), ladders.kept_for(max(staying), length)


def score_completions(
    engine: Engine, samples: Sequence[Sample], pruning: Pruning, ids: object, mask: object, mode: str, temperature: float
) -> np.ndarray:
    """Log-probabilities of given completions. ids: (B, G, C) int; mask: (B, G, C), 1 on their tokens, None: all; see `logprobs`.

    Returns: (B, G, C) float32, 0 on padding. Raises: GlimpseError that names the argument at fault.
    """
    check_choice("mode", mode, MODES)
    temperature = one(Temperature, temperature, "temperature")
    rule, count = pruning.rule, len(samples)
    if not temperature:
        raise GlimpseError("temperature=0: log-probabilities are those of a distribution, so it must be above 0")
    if pruning.plan and (rule is None or rule.reference_masks is None):
        raise GlimpseError("prune: log-probabilities need Prune(reference_masks=...), for example the `keep` of a Generation; or None")
    tokens = numeric("completion_ids", ids)
    if tokens.ndim != 3 or len(tokens) != count or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise GlimpseError(f"completion_ids must be a (prompts, completions, tokens) integer array of {count} prompts, not {tokens.shape}")
    if not ((tokens >= 0) & (tokens < engine.config.text.vocab_size)).all():
        raise GlimpseError(f"completion_ids holds ids outside 0..{engine.config.text.vocab_size - 1}")
    valid = np.ones(tokens.shape, bool) if mask is None else numeric("completion_mask", mask).astype(bool)
    if valid.shape != tokens.shape or (valid[..., 1:] & ~valid[..., :-1]).any():
        raise GlimpseError(f"completion_mask {valid.shape} must fit completion_ids {tokens.shape}, with 1 before 0 in every row")
    batch = engine.batch(samples, pruning)
    given = rule.reference_masks if batch.plan and rule is not None else None
    masks = [np.ones(sample.count, bool) for sample in samples]
    if given is not None:
        whole = [reference_mask(given[b], sample.grids, f"reference_masks[{b}]") for b, sample in enumerate(samples)]
        masks = [mask[sample.tokens] for mask, sample in zip(whole, samples, strict=True)]
    prompt, length = masked_prompt(engine, batch, masks, engine.view(batch), range(count), batch.size)
    rows = ((0, batch.size - count), (0, 0), (0, 0))
    completions = engine.split(Completions(np.pad(tokens, rows).astype(np.int32), np.pad(valid, rows)), batch.size)
    shared: dict[str, Any] = dict(mode=mode, temperature=temperature, attention=engine.attention)
    found = engine.call(logprobs, engine.model, prompt, completions, plan=batch.plan, length=length, **shared)
    return engine.fetch(found)[:count, ..., 0]


def read_prompt(stages: Stages, prompt: MaskedPrompt, plan: Plan, length: int) -> Prefix:
    """Prompts as `generate` reads them. plan: no cut, or one that keeps the prompts' masks; length: static, of the longest prompt behind
    it."""

    def finish(stream: Stream | None, logits: Array | None, scores: Scores) -> Prefix:
        assert stream is not None and logits is not None, "the walk goes to its end"
        return Prefix(stream.kv, logits, prompt.next_position)

    rules = [(prompt.limits, prompt.given) for _ in plan]
    route = Route(plan, rules, prompt.vision, prompt.features, FixedLength(length), finish)
    return stages.walk(stages.embed(prompt.prompt, prompt.features), route)


def behind_prompt(layer: Layer, x: Array, angles: Array, valid: Array, key: Array, value: Array, seen: Array) -> Array:
    """One layer over completion rows (R, C, D) that share the caches of B prompts."""
    copies = x.shape[0] // key.shape[0]
    own = LayerKV(*(jnp.repeat(part, copies, axis=0) for part in (key, value, seen)))
    return constrained(layer.extend(x, angles, behind(own.valid, valid), own)[0], "batch")


def token_logprobs(decoder: Decoder, hidden: Array, ids: Array, temperature: float = 1.0) -> Array:
    """What the rows predict. hidden: (R, C, D); ids: (R, C) int, the token behind each.

    Returns: (R, C, 2) float32: log-probability, and entropy of the distribution (without gradient), in nats.
    """

    @jax.checkpoint
    def some_tokens(hidden: Array, ids: Array) -> Array:
        return logprob_and_entropy(decoder.logits(hidden) / temperature, ids)

    rows, count = ids.shape
    least = math.ceil(rows * count * decoder.config.vocab_size * 4 / LOGITS_BYTES)
    by_token = in_slices(some_tokens, (jnp.swapaxes(hidden, 0, 1), ids.T), least)  # rows stay split over a mesh
    return jnp.swapaxes(by_token, 0, 1)


def logprob_and_entropy(logits: Array, ids: Array) -> Array:
    """(..., V), (...) int -> (..., 2) float32."""
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    entropy = total - jnp.sum(jnp.exp(logits - total[..., None]) * logits, axis=-1)
    return jnp.stack([picked - total, jax.lax.stop_gradient(entropy)], axis=-1)


def completion_logprobs(model: LVLM, first: Array, prefix: Prefix, completions: Completions, temperature: float, call: Callable) -> Array:
    """Completions behind prompts that were read. first: (B, V) float32, logits of their first token.

    Returns: (B, G, C, 2) float32, see `token_logprobs`.
    """
    batch, group, count = completions.ids.shape
    flat = completions.ids.reshape(batch * group, count)
    lead = logprob_and_entropy(jnp.repeat(first / temperature, group, axis=0), flat[:, 0])[:, None]
    if count > 1:
        ids, valid = flat[:, :-1], completions.valid.reshape(batch * group, count)[:, :-1]
        position = jnp.repeat(prefix.next_position, group)[:, None] + jnp.arange(count - 1)
        angles = model.decoder.angles(jnp.broadcast_to(position, (model.config.position_axes, *position.shape)))
        x = constrained(model.decoder.embed(ids), "batch")
        for layer, kv in zip(model.decoder.layers, prefix.kv, strict=True):
            x = call(behind_prompt, layer, x, angles, valid, kv.key, kv.value, kv.valid)
        lead = jnp.concatenate([lead, token_logprobs(model.decoder, x, flat[:, 1:], temperature)], axis=1)
    return jnp.where(completions.valid[..., None], lead.reshape(batch, group, count, 2), 0)


def logprobs(
    model: LVLM,
    prompt: MaskedPrompt,
    completions: Completions,
    plan: Plan,
    length: int,
    *,
    mode: str = EXACT,
    reference: bool = False,
    temperature: float = 1.0,
    attention: str = "auto",
    remat: bool = False,
) -> Array:
    """Log-probability and entropy of every token of completions, in nats; 0 on padding.

    Args:
        plan: as of `read_prompt`; length: static; mode: of MODES.
        reference: whether the model is the reference of a KL term, whose first token the released trainer computes unpruned.
        temperature: of the distribution, above 0.
    Returns: (B, G, C, 2) float32.
    """
    call = remembered if remat else at_once
    stages = Stages(model, call, attention)
    if mode == RELEASED and plan:
        first = read_prompt(stages, prompt, () if reference else plan, length).logits
        prefix = read_prompt(stages, prompt, (Cut(-1, "given"),), length)
    else:
        prefix = read_prompt(stages, prompt, plan, length)
        first = prefix.logits
    return completion_logprobs(model, first, prefix, completions, temperature, call)
