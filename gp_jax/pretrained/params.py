"""Weights in and out: one table of names, read in both directions, checked both ways.

Checkpoints of Qwen2.5-VL come in two styles, `visual.*` / `model.layers.*` (transformers 4) and `model.visual.*` /
`model.language_model.layers.*`. Linear weights keep their layout; only the patch embedding is a convolution there.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gp_jax.config import GlimpseConfig, ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.lvlm import LVLM
from gp_jax.pretrained.files import TensorSource
from gp_jax.sharding import parameter_sharding


@dataclass(frozen=True)
class Rule:
    """`ours` and `theirs` are prefixes that replace each other."""

    ours: str
    theirs: str


# The first rule whose prefix fits decides.
BASE = (
    Rule("vision.patch_embed.weight", "visual.patch_embed.proj.weight"),
    Rule("vision.merger.fc1.", "visual.merger.mlp.0."),
    Rule("vision.merger.fc2.", "visual.merger.mlp.2."),
    Rule("vision.", "visual."),
    Rule("decoder.embed_tokens", "model.embed_tokens.weight"),
    Rule("decoder.lm_head.", "lm_head."),
    Rule("decoder.", "model."),
)
GLIMPSE = (
    Rule("predictor.", "attn_fuser."),
    Rule("glimpse.", ""),
)
NESTED = (("model.visual.", "visual."), ("model.language_model.", "model."))  # prefixes in the nested and in the flat style
IGNORED = ("*rotary_emb.inv_freq", "*rotary_pos_emb.inv_freq")


def canonical(key: str) -> str:
    """A checkpoint key in the flat style."""
    return next((flat + key[len(nested) :] for nested, flat in NESTED if key.startswith(nested)), key)


def nested_key(key: str) -> str:
    """The flat style's key in the nested style."""
    return next((nested + key[len(flat) :] for nested, flat in NESTED if key.startswith(flat)), key)


def checkpoint_name(path: str) -> str:
    """Our dotted path as a key of the flat style (base) or of a released glimpse."""
    rule = next(r for r in BASE + GLIMPSE if path.startswith(r.ours))
    return rule.theirs + path[len(rule.ours) :]


def is_glimpse(path: str) -> bool:
    """Whether a parameter belongs to the glimpse (its own file, float32)."""
    return path.startswith(tuple(rule.ours for rule in GLIMPSE))


def checkpoint_shape(path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """The shape a parameter has in a checkpoint."""
    vision = config.vision
    if path == "vision.patch_embed.weight":
        return (shape[0], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return shape


def flat_params(state: nnx.State) -> dict[str, jax.Array]:
    """A model's parameters by dotted path."""
    return {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


def abstract_model(config: ModelConfig, glimpse: GlimpseConfig | None, dtype: jnp.dtype) -> LVLM:
    """The model with shapes instead of arrays."""
    return nnx.eval_shape(lambda: LVLM(config, glimpse, dtype=dtype, rngs=nnx.Rngs(0)))


def _optional(path: str, glimpse: GlimpseConfig | None) -> bool:
    """Released V2 predictors carry condition projections that nothing reads; files without them are as good."""
    return bool(glimpse) and glimpse.attn_fuse_type == "AttnFuserV2" and path.startswith("predictor.cond_in_projs.")


def misfits(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], optional: set[str]) -> list[str]:
    """What of a source's keys does not fit, in words: missing, unknown and mis-shaped keys. Empty when all fit."""
    missing = sorted(k for k in wanted if k not in found and k not in optional)
    unknown = sorted(k for k in found if k not in wanted)
    wrong = [f"{k} {list(found[k])}, expected {list(s)}" for k, s in sorted(wanted.items()) if k in found and tuple(found[k]) != s]
    kinds = (("missing", missing), ("unknown", unknown), ("mis-shaped", wrong))
    return [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds if names]


def load(
    config: ModelConfig,
    glimpse: GlimpseConfig | None,
    base: TensorSource,
    extra: TensorSource | None,
    *,
    dtype: jnp.dtype | None,
    mesh: Mesh | None,
    progress: Callable[[Iterator], Iterator] = iter,
) -> LVLM:
    """Builds the model, each tensor read, cast and put straight to its place on the mesh.

    Args: base, extra: checkpoint and glimpse tensors; dtype: of the base, None: as stored. The glimpse is float32.
    Raises: GlimpseError that lists every key that does not fit, before anything is read.
    """
    tied, names = config.text.tie_word_embeddings, [key for key in base.shapes if not any(fnmatch.fnmatchcase(key, p) for p in IGNORED)]
    base_keys = {canonical(key): key for key in names if not (tied and key == "lm_head.weight")}  # tied: a copy of the embedding
    twice = sorted(key for key in names if base_keys.get(canonical(key), key) != key)
    if dtype is None:
        embedding = base_keys.get(checkpoint_name("decoder.embed_tokens"))
        dtype = base.dtype(embedding) if embedding else jnp.float32
    graph, state = nnx.split(abstract_model(config, glimpse, dtype))
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    wanted = {path: checkpoint_shape(path, v.shape, config) for path, v in variables.items()}
    optional = {checkpoint_name(p) for p in wanted if _optional(p, glimpse)}
    problems = [f"{base.where}: {len(twice)} in both key styles: {', '.join(twice)}"] if twice else []
    for source, keys, chosen in ((base, base_keys, False), (extra, {k: k for k in extra.shapes} if extra else {}, True)):
        if source is not None:
            expected = {checkpoint_name(p): shape for p, shape in wanted.items() if is_glimpse(p) == chosen}
            found = {name: source.shapes[key] for name, key in keys.items()}
            problems += [f"{source.where}: {problem}" for problem in misfits(expected, found, optional)]
    if problems:
        raise GlimpseError(f"weights do not fit the config: {'; '.join(problems)}")

    def place(path: str, variable: nnx.Variable) -> jax.Array:
        name, shape = checkpoint_name(path), variable.shape
        source, key = (extra, name) if is_glimpse(path) else (base, base_keys[name])
        sharding = parameter_sharding(path, shape, mesh, config.text)
        if key not in source.shapes:
            return jax.device_put(jnp.zeros(shape, variable.dtype), sharding)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if wanted[path] == shape:
                return source.read(key, index).astype(variable.dtype, copy=False)
            return source.read(key, ()).reshape(shape)[index].astype(variable.dtype)  # the convolution, a small one

        return jax.make_array_from_callback(shape, sharding, part)

    loaded = nnx.from_flat_state([(tuple(_keys(path)), v.replace(place(path, v))) for path, v in progress(list(variables.items()))])
    return nnx.merge(graph, loaded)


def _keys(path: str) -> Iterator[str | int]:
    return (int(part) if part.isdigit() else part for part in path.split("."))


def export_base(model: LVLM, nested: bool) -> dict[str, jax.Array]:
    """The base's tensors by checkpoint key, in the flat or nested style."""
    tensors = {}
    for path, value in flat_params(nnx.state((model.vision, model.decoder), nnx.Param)).items():
        path = ("vision", "decoder")[int(path[0])] + path[1:]
        name, shape = checkpoint_name(path), checkpoint_shape(path, value.shape, model.config)
        tensors[nested_key(name) if nested else name] = value if value.shape == shape else value.reshape(shape)
    return tensors


def export_glimpse(model: LVLM) -> dict[str, jax.Array]:
    """The glimpse's tensors by released name; none without one. They lie whole on every device, so any process can write them."""
    tensors = {}
    for part in ("glimpse", "predictor"):
        if (module := getattr(model, part)) is not None:
            own = flat_params(nnx.state(module, nnx.Param))
            tensors |= {checkpoint_name(f"{part}.{path}"): value for path, value in own.items()}
    return tensors


def nested_glimpse(tensors: Mapping[str, jax.Array]) -> dict:
    """Flat released names as the released file nests them: one dict per module, the embeddings on their own."""
    tree: dict = {}
    for key, value in tensors.items():
        module, _, rest = key.partition(".")
        if rest:
            tree.setdefault(module, {})[rest] = value
        else:
            tree[module] = value
    return tree
