"""Weights in and out by the names of `pretrained.names`, checked both ways.

Linear weights keep their layout; only the patch embedding is a convolution there.
"""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gp_jax.config import GlimpseConfig, ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.lvlm import LVLM
from gp_jax.pretrained.files import TensorSource
from gp_jax.pretrained.names import GLIMPSE, NAMES, checkpoint_name, is_glimpse
from gp_jax.sharding import parameter_sharding, spread


def checkpoint_shape(path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """The shape a parameter has in a checkpoint: there the patch embedding is a convolution."""
    return (shape[0], *config.vision.patch_shape) if path == "vision.patch_embed.weight" else shape


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
    names = NAMES[config.model_type]
    keys = [key for key in base.shapes if not names.skips(key)]
    copied = checkpoint_name("decoder.lm_head.weight", names.rules) if config.text.tie_word_embeddings else None  # of the embedding
    base_keys = {names.canonical(key): key for key in keys if names.canonical(key) != copied}
    twice = sorted(key for key in keys if base_keys.get(names.canonical(key), key) != key)

    def name_of(path: str) -> str:
        return checkpoint_name(path, names.rules + GLIMPSE)

    if dtype is None:
        embedding = base_keys.get(name_of("decoder.embed_tokens"))
        dtype = base.dtype(embedding) if embedding else jnp.float32
    graph, state = nnx.split(abstract_model(config, glimpse, dtype))
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    wanted = {path: checkpoint_shape(path, v.shape, config) for path, v in variables.items()}
    optional = {name_of(p) for p in wanted if _optional(p, glimpse)}
    problems = [f"{base.where}: {len(twice)} in both key styles: {', '.join(twice)}"] if twice else []
    for source, keys, chosen in ((base, base_keys, False), (extra, {k: k for k in extra.shapes} if extra else {}, True)):
        if source is not None:
            expected = {name_of(p): shape for p, shape in wanted.items() if is_glimpse(p) == chosen}
            found = {name: source.shapes[key] for name, key in keys.items()}
            problems += [f"{source.where}: {problem}" for problem in misfits(expected, found, optional)]
    if problems:
        raise GlimpseError(f"weights do not fit the config: {'; '.join(problems)}")

    def place(path: str, variable: nnx.Variable) -> jax.Array:
        name, shape = name_of(path), variable.shape
        source, key = (extra, name) if is_glimpse(path) else (base, base_keys[name])
        sharding = parameter_sharding(path, shape, mesh, config.text)
        if key not in source.shapes:
            return spread(np.zeros(shape, variable.dtype), sharding)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if wanted[path] == shape:
                return source.read(key, index).astype(variable.dtype, copy=False)
            return source.read(key, ()).reshape(shape)[index].astype(variable.dtype)  # the convolution, a small one

        parts: dict[tuple, np.ndarray] = {}  # JAX asks for every device and holds all it got: devices with the same part share it

        def part(index: tuple[slice, ...]) -> np.ndarray:
            place = tuple((own.start, own.stop) for own in index)
            if place not in parts:
                parts[place] = read(index)
            return parts[place]

        return jax.make_array_from_callback(shape, sharding, part)

    loaded = nnx.from_flat_state([(tuple(_keys(path)), v.replace(place(path, v))) for path, v in progress(list(variables.items()))])
    return nnx.merge(graph, loaded)


def _keys(path: str) -> Iterator[str | int]:
    return (int(part) if part.isdigit() else part for part in path.split("."))


def export_base(model: LVLM, nested: bool) -> dict[str, jax.Array]:
    """The base's tensors by checkpoint key, in the flat or nested style."""
    tensors, names = {}, NAMES[model.config.model_type]
    for path, value in flat_params(nnx.state((model.vision, model.decoder), nnx.Param)).items():
        path = ("vision", "decoder")[int(path[0])] + path[1:]
        name, shape = checkpoint_name(path, names.rules), checkpoint_shape(path, value.shape, model.config)
        tensors[names.nested_key(name) if nested else name] = value if value.shape == shape else value.reshape(shape)
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
