"""The jitted inference function: one pure program from pixels and prompt to tokens, with every bucket inside.

It takes and returns plain dicts of arrays, so that it can be jitted, sharded and exported (`jax.export`, `exporting`).

B samples, T prompt rows, S vision patches, M vision slots, A position axes, N = min(M, T) visual tokens, n new tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gp_jax.buckets import Ladder, Ladders
from gp_jax.config.choices import check_choice
from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.config.schema import AtLeastOne, Several, one
from gp_jax.errors import GlimpseError, TooLong
from gp_jax.inference import traced
from gp_jax.inference.look_inputs import LOOK_INPUTS, as_dict, first_buckets, look_inputs, told_looks
from gp_jax.inference.requests import AUTO, Pruning, make_batch, resolve, sampling_settings
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.target import PLATFORMS, targeting
from gp_jax.pretrained.params import abstract_model, flat_params
from gp_jax.processing.images import MAX_PIXELS, ImageLike
from gp_jax.processing.layout import ARRAYS, Sample, prompt_input, read_samples, slots_of, vision_input
from gp_jax.processing.qwen import Processor
from gp_jax.pruning.plan import Plan, needs_glimpse
from gp_jax.pruning.rule import Prune

PARTS = (4, 2, 1)  # of the pictures, for which a program with a look has sizes
KERNELS = ("auto", "xla")  # xla: XLA's own operations, which XLA can split over any mesh, on every platform

INPUTS = {
    "patches": "(B, S, values) float32: normalised pixels of every patch, in window order",
    "patch_hw": "(B, S, 2) int32: row and column of a patch in its picture",
    "patch_window": "(B, S) int32: attention window inside the sample, -1 padding",
    "patch_image": "(B, S) int32: picture inside the sample, -1 padding",
    "token_hw": "(B, M, 2) int32: row and column of a visual token in its picture",
    "token_window": "(B, M) int32: attention window inside the sample, -1 padding",
    "token_image": "(B, M) int32: picture inside the sample, -1 padding",
    "token_sides": "(B, M, 2) int32: rows and columns of the whole picture in visual tokens",
    "ids": "(B, T) int32: token ids, left-aligned",
    "positions": "(B, A, T) int32: position ids (time, row, column)",
    "valid": "(B, T) bool: rows that are not padding; a sample without any only fills the batch",
    "image_slot": "(B, T) int32: the vision slot (0 .. M - 1) of an image token, -1 elsewhere",
    "glimpse_row": "(B, T) int32: 0, 1, ... on the glimpse rows behind the prompt, -1 elsewhere",
    "tap_row": "(B,) int32: the last of these rows, or of the prompt",
    "next_position": "(B,) int32: position of the first new token",
    **LOOK_INPUTS,
    "cut*_threshold": "(B, 1) float32: keep visual tokens whose importance is above it",
    "cut*_cap_trigger": "(B,) int32: more kept than this ...",
    "cut*_cap": "(B,) int32: ... and only this number of the best stay",
    "cut*_floor": "(B,) int32: this number of the best always stay",
    "cut*_fixed": "(B,) int32: exactly this number of the best stay, -1: off",
    "cut*_always": "(B, M) bool: vision slots that always stay",
    "cut*_given": "(B, M) float32: scores that come with the request (plans random, nothing, reference masks)",
}
OUTPUTS = {
    "tokens": "(B, n) int32: new tokens, padding behind a sample's end",
    "lengths": "(B,) int32: new tokens of a sample, its end token included",
    "seen": "(B, N) bool: the visual tokens that the vision tower saw, in the order of keep; all of them without a look",
    "kept": "(B,) int32: visual tokens that were left after the last cut",
    "visual_tokens": "(B,) int32: visual tokens before it",
    "keep": "(B, N) bool: which of them, picture by picture, row by row, then padding",
    "importance": "(B, N) float32: what the keep rule compared with its threshold, in the same order; 0 without a cut",
    "first_logits": "(B, V) float32: logits of the first new token; where they are not finite, the tokens mean nothing",
}


def inference_buckets(
    config: ModelConfig,
    *,
    batch: int = 1,
    visual_tokens: Sequence[int] = (1024,),
    prompt: Sequence[int] = (),
    kept: Sequence[int] = (),
    cuts: int = 1,
    look: bool = False,
) -> Ladders:
    """Sizes for `inference_fn`. The largest are the capacity; smaller ones let it do less where a request is small.

    Args:
        batch: samples.
        visual_tokens: of a sample. A single picture with this number always fits, whatever its shape.
        prompt: rows of a sample, its visual tokens and the glimpse's rows included; default: the visual tokens and 128 more.
        kept: rows left behind a cut, to choose from; default: a few parts of the prompt.
        cuts: of the plan: behind each there is a copy of the rest of the program per size.
        look: there are two looks: where only one size of visual tokens or prompt is given, add smaller ones, for the parts that are seen.
    Raises: GlimpseError that names the setting.
    """
    batch = one(AtLeastOne, batch, "batch")
    given = {"visual_tokens": visual_tokens, "prompt": prompt, "kept": kept}
    visual_tokens, prompt, kept = (one(Several[AtLeastOne], sizes, name) for name, sizes in given.items())
    most = max(visual_tokens, default=1)
    prompt = sorted(prompt) or [-(-(most + 128) // 64) * 64]
    if look and len(prompt) == 1:
        prompt = sorted({-(-max(1, prompt[0] - most + most // part) // 16) * 16 for part in PARTS} & {*range(prompt[0])} | {*prompt})
    slots, tile = {config.vision.slots_for(size) for size in visual_tokens}, config.vision.window_side**2
    if look and len(slots) == 1:
        slots = {-(-max(slots) // part // tile) * tile for part in PARTS}
    patches = sorted(size * config.vision.merge_unit for size in slots)
    parts = (16, 8, 4, 2) if cuts < 2 else (4,)
    kept = sorted(kept) or sorted({-(-prompt[-1] // part // 16) * 16 or 1 for part in parts})
    return Ladders(
        Ladder("patches", tuple(patches)), Ladder("prompt", tuple(prompt)), Ladder("kept", tuple(kept)), batch=Ladder("batch", (batch,))
    )


def inference_params(model: LVLM) -> dict[str, Any]:
    """A model's parameters as `inference_fn` takes them: nested dicts of arrays, on the devices where they are."""
    tree: dict[str, Any] = {}
    for path, value in flat_params(nnx.split(model)[1]).items():
        *above, name = path.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[name] = value
    return tree


def inference_inputs(
    samples: Sequence[Sample],
    config: ModelConfig,
    glimpse: GlimpseConfig | None,
    prune: Prune | Plan | Pruning | str | None,
    buckets: Ladders,
) -> dict[str, np.ndarray]:
    """What `inference_fn` of the same plan and buckets takes: see INPUTS; every array has the batch in front.

    Args: samples: of `layout.read_samples`, up to the batch. Raises: GlimpseError that names the ladder that is too short.
    """
    pruning = _resolved(prune, glimpse, config)
    looks = first_buckets(config, pruning.look, buckets) is not None
    samples = told_looks(config, samples, pruning) if pruning.look is not None and not looks else samples
    rows = glimpse.rows if glimpse and needs_glimpse(pruning.plan) else 0
    batch, length = buckets.batch.rungs[-1], buckets.prompt.rungs[-1]
    buckets.batch.fit(len(samples))
    for sample in samples:
        buckets.prompt.fit(sample.ids.size + rows)
        buckets.patches.fit(max(1, sample.slots.size * config.vision.merge_unit))
    slots = slots_of(buckets.patches.rungs[-1], config)
    made = make_batch(samples, pruning, batch, slots)
    inputs = as_dict(vision_input(samples, config, batch, slots)) | as_dict(prompt_input(samples, config, batch, length, rows))
    inputs |= {"positions": np.moveaxis(inputs["positions"], 0, 1), "next_position": made.next_positions}
    if looks:
        inputs |= look_inputs(samples, config, glimpse, pruning, buckets, rows)
    for number, cut in enumerate(made.cuts):
        rule = as_dict(cut.limits) | {"threshold": np.full((batch, 1), cut.limits.threshold, np.float32)}
        rule |= {} if cut.given is None else {"given": cut.given}
        inputs |= {f"cut{number}_{name}": value for name, value in rule.items()}
    return inputs


def fitting_inputs(
    processor: Processor,
    pictures: Sequence[Sequence[ImageLike]],
    questions: Sequence[str],
    glimpse: GlimpseConfig | None,
    prune: Prune | Plan | str | None,
    buckets: Ladders,
    *,
    system: str | None = None,
    shrink: bool = True,
) -> tuple[dict[str, np.ndarray | None], dict[str, np.ndarray]]:
    """A request from pictures (a list per question), which are scaled down where the program's sizes are too small for them.

    Args: shrink: no: such pictures are an error. LLaVA's, whose number of visual tokens is fixed, always are.
    Returns: the processor's arrays, as `GlimpseVLM.generate` takes them, and the program's inputs. Raises: GlimpseError.
    """
    config = processor.config

    def request(processor: Processor) -> tuple[dict, list[Sample]]:
        raw = processor(pictures, questions, system, MAX_PIXELS).inputs
        return raw, read_samples(config, *(raw.get(name) for name in ARRAYS))

    raw, samples = request(processor)
    try:
        return raw, inference_inputs(samples, config, glimpse, prune, buckets)
    except TooLong:
        text = max(sample.ids.size - sample.count for sample in samples)
        text += glimpse.rows if glimpse and needs_glimpse(_resolved(prune, glimpse, config).plan) else 0
        most = picture_capacity(buckets, config, text, max(map(len, pictures)))
        if not shrink or not processor.shrinks or most < 1:
            raise
    raw, samples = request(processor.limited(most))
    return raw, inference_inputs(samples, config, glimpse, prune, buckets)


def picture_capacity(buckets: Ladders, config: ModelConfig, text: int, pictures: int) -> int:
    """Visual tokens that each of a sample's pictures may have, whatever its shape (see `inference_buckets`). text: its other rows."""
    slots = buckets.patches.rungs[-1] // config.vision.merge_unit
    return min(config.vision.tokens_in(slots, pictures), buckets.prompt.rungs[-1] - text) // max(1, pictures)


def inference_fn(
    config: ModelConfig,
    plan: Prune | Plan | str | None = AUTO,
    buckets: Ladders | None = None,
    max_new_tokens: int = 128,
    *,
    glimpse: GlimpseConfig | None = None,
    eos_token_id: int | Sequence[int] | str | None = AUTO,
    attention: str = "auto",
) -> Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Array]]:
    """A pure function (params, inputs) -> outputs that answers with the tokens of `GlimpseVLM.generate`, greedily.

    It holds all buckets: `lax.switch` chooses among the rungs of `buckets.patches`, `prompt` and `kept`, whose last ones are the
    capacity. Which attention kernel runs is decided when it is lowered, for whichever platform that is, or for several at once.

    Args:
        config, glimpse: of the model (`GlimpseVLM.config`, `.glimpse_config`).
        plan: `Prune` settings, None for no pruning, "auto" for those in the glimpse's config; or a `plan.Plan`. Cuts are compiled in,
            the numbers of the keep rule come with the inputs.
        buckets: default: `inference_buckets(config)`.
        eos_token_id: as of `generate`.
        attention: "auto", or "xla": no Pallas kernels, for TPU programs that XLA must split over a mesh by itself.
    Returns: the function. params: of `inference_params`; inputs: of `inference_inputs`; outputs: see OUTPUTS.
    Raises: GlimpseError that names the argument at fault; the function itself when an array's shape is not the program's.
    """
    pruning = _resolved(plan, glimpse, config)
    plan = pruning.plan
    buckets = buckets or inference_buckets(config, cuts=len(plan), look=pruning.look is not None)
    if not slots_of(most := buckets.patches.rungs[-1], config):
        window = config.vision.merge_unit * config.vision.window_side**2
        raise GlimpseError(f"{most} patches are less than an attention window of this model, {window}; raise Ladders.patches")
    max_new_tokens = one(AtLeastOne, max_new_tokens, "max_new_tokens")
    check_choice("attention", attention, KERNELS)
    settings = partial(sampling_settings, config, 0.0, 0, 1.0, 0, eos_token_id, buckets.batch.rungs[-1])
    settings()  # raises now, not when it is traced

    @cache
    def parts(dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(abstract_model(config, glimpse, dtype))

    parts(jnp.dtype(jnp.float32))  # as above
    first = first_buckets(config, pruning.look, buckets)
    bare = Prune(look=pruning.look) if first else Prune()  # what only requests have, such as masks, does not change shapes
    shapes = {name: x.shape for name, x in inference_inputs([], config, glimpse, Pruning(plan, bare), buckets).items()}
    platforms = ("xla",) if attention == "xla" else PLATFORMS

    def infer(params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Array]:
        found = {name: tuple(getattr(x, "shape", ())) for name, x in inputs.items()}
        if found != shapes:
            wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            raise GlimpseError(f"inputs: {wrong[0]} has the shape {found.get(wrong[0])}, this program takes {shapes.get(wrong[0])}")
        graph, state = parts(_base_dtype(params))
        with targeting(*platforms):
            model, arrays = nnx.merge(graph, _state(state, params)), {name: jnp.asarray(x) for name, x in inputs.items()}
            return traced.answer(model, plan, buckets, settings(), max_new_tokens, arrays, first)

    return infer


def _resolved(prune: Prune | Plan | Pruning | str | None, glimpse: GlimpseConfig | None, config: ModelConfig) -> Pruning:
    """`requests.resolve` that also takes a plan as it is; its keep rule is the default one then."""
    if isinstance(prune, tuple):
        return prune if isinstance(prune, Pruning) else Pruning(prune, Prune())
    return resolve(prune, glimpse, config.text.num_hidden_layers)


def _base_dtype(params: Mapping[str, Any]) -> jnp.dtype:
    """The type of the base model's parameters; what is missing of them `_state` says."""
    return jnp.dtype(getattr(params.get("decoder", {}).get("embed_tokens"), "dtype", jnp.float32))


def _state(state: nnx.State, params: Mapping[str, Any]) -> nnx.State:
    """Parameters in the places of an abstract state. Raises: GlimpseError that names one that is missing."""
    filled = []
    for path, variable in nnx.to_flat_state(state):
        node = params
        for part in map(str, path):
            if part not in node:
                raise GlimpseError(f"params: {'.'.join(map(str, path))} is missing")
            node = node[part]
        filled.append((path, variable.replace(node)))
    return nnx.from_flat_state(filled)
