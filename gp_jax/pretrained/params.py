"""Loading and exporting weights by the names of `pretrained.names`; keys must match in both directions.

Weights have the layout of the checkpoint, except the patch embedding, which is a convolution there.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.errors import GlimpseError, printable, some
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.misfits import cause, misfits
from gp_jax.pretrained.names import GLIMPSE, checkpoint_name, is_glimpse, names_of
from gp_jax.pretrained.sources import TensorSource
from gp_jax.sharding import parameter_sharding, put, spread

MISFIT = "weights do not fit the config"
BLOCK = 1 << 22  # values of a tensor that are compared at a time


def checkpoint_shape(path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """The shape a parameter has in a checkpoint: there the patch embedding is a convolution."""
    return (shape[0], *config.vision.patch_shape) if path == "vision.patch_embed.weight" else shape


def flat_params(state: nnx.State) -> dict[str, jax.Array]:
    """A model's parameters by dotted path."""
    return {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


def replace_params(model: LVLM, params: Mapping[str, Any]) -> None:
    """Replaces all or some of a model's parameters. The memory of the old ones is freed when nothing else refers to them.

    Args: params: nested dicts of arrays by the names of `flat_params`; an array with the old one's sharding is used without a copy.
    Raises: GlimpseError that names the parameter, before anything is replaced.
    """
    own = {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}
    new = dict(_flat(params))
    for name, value in new.items():
        if name not in own:
            raise GlimpseError(f"params: {printable(name, 120)} is not a parameter of this model")
        old, shape, dtype = own[name].get_raw_value(), getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape != old.shape or dtype != old.dtype:
            raise GlimpseError(f"params: {name} has the shape {shape} and type {dtype}, this model's has {old.shape} and {old.dtype}")
    for name, value in new.items():
        own[name].set_raw_value(_in_place_of(own[name].get_raw_value(), value))


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _in_place_of(old: jax.Array, value: Any) -> jax.Array:
    """The value with the sharding and the exact type of the old array, so that compiled programs accept it."""
    if getattr(value, "weak_type", False):
        value = np.asarray(value)
    return put(value, old.sharding)


def flat_paths(model: LVLM) -> list[str]:
    """Dotted paths of a model's parameters."""
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]


def abstract_model(config: ModelConfig, glimpse: GlimpseConfig | None, dtype: jnp.dtype) -> LVLM:
    """The model with shapes instead of arrays. All layers are equal: one is traced, the others are copies of it."""
    one = shallow(config)
    model = nnx.eval_shape(lambda: LVLM(one, glimpse, dtype=dtype, rngs=nnx.Rngs(0)))
    model.config, model.decoder.config, model.vision.config = config, config.text, config.vision
    model.decoder.layers = nnx.List([nnx.clone(model.decoder.layers[0]) for _ in range(config.text.num_hidden_layers)])
    model.vision.blocks = nnx.List([nnx.clone(model.vision.blocks[0]) for _ in range(config.vision.depth)])
    return model


def shallow(config: ModelConfig) -> ModelConfig:
    """The config with one decoder layer and one vision block."""
    text, vision = dataclasses.replace(config.text, num_hidden_layers=1), dataclasses.replace(config.vision, depth=1)
    return dataclasses.replace(config, text=text, vision=vision)


def _optional(path: str, glimpse: GlimpseConfig | None) -> bool:
    """Whether a parameter may be missing: the condition projections of V2 predictors, which nothing reads."""
    return glimpse is not None and glimpse.attn_fuse_type == "AttnFuserV2" and path.startswith("predictor.cond_in_projs.")


class BaseKeys:
    """The keys of a base model's tensors, by the names of its rules."""

    def __init__(self, config: ModelConfig, source: TensorSource):
        self.source, self.names = source, names_of(config)
        keys = [key for key in source.shapes if not self.names.skips(key)]
        self.keys = {self.names.canonical(key): key for key in keys}
        self.twice = sorted(key for key in keys if self.keys[self.names.canonical(key)] != key)
        self.embedding, self.head = (self.name(path) for path in ("decoder.embed_tokens", "decoder.lm_head.weight"))

    def name(self, path: str) -> str:
        """The rules' key of a path here."""
        return checkpoint_name(path, self.names.rules + GLIMPSE)

    def check_depth(self, config: ModelConfig) -> None:
        """Raises: GlimpseError when the file has another number of layers than the config. Checked before layers are built."""
        for part, ours, count in (
            ("layers of the decoder", "decoder.layers.", config.text.num_hidden_layers),
            ("blocks of the vision tower", "vision.blocks.", config.vision.depth),
        ):
            prefix = self.name(ours)
            numbers = {key[len(prefix) :].split(".", 1)[0] for key in self.keys if key.startswith(prefix)}
            if len(numbers) != count:
                names = [self.name(path) for path in flat_paths(abstract_model(shallow(config), None, jnp.float32))]
                said = f"{self.source.where}: holds {len(numbers)} {part} ({prefix}*), the config says {count}"
                raise GlimpseError(f"{MISFIT}: {said}{cause(self.keys, names, self.names, config.model_type)}")

    def tied(self, config: ModelConfig, dtype: jnp.dtype) -> ModelConfig:
        """The config, with `tie_word_embeddings` as the file has it. As in transformers a tied config holds if the file has only one of
        head and embedding, or both and they are equal. A head that differs is used, with a warning."""
        if not config.text.tie_word_embeddings or self.head not in self.keys:
            return config
        if self.embedding not in self.keys:
            self.keys[self.embedding] = self.keys[self.head]
        elif not self.equal(self.keys[self.embedding], self.keys[self.head], dtype):
            warnings.warn(
                f"{self.source.where}: config.json says tie_word_embeddings, but {self.keys[self.head]} differs from "
                f"{self.keys[self.embedding]}: the output head of the file is used",
                stacklevel=4,
            )
            return dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=False))
        del self.keys[self.head]
        return config

    def equal(self, one: str, other: str, dtype: jnp.dtype) -> bool:
        """Whether two tensors are equal in `dtype`; they are read in blocks of rows."""
        shape = self.source.shapes[one]
        if shape != self.source.shapes[other] or not shape or 0 in shape:
            return False
        rows = max(1, BLOCK // (math.prod(shape[1:]) or 1))
        blocks = ((slice(start, start + rows),) for start in range(0, shape[0], rows))

        def read(key: str, block: tuple[slice, ...]) -> np.ndarray:
            return self.source.read(key, block).astype(dtype)

        return all(np.array_equal(read(one, block), read(other, block)) for block in blocks)


def load(
    config: ModelConfig,
    glimpse: GlimpseConfig | None,
    base: TensorSource,
    extra: TensorSource | None,
    *,
    dtype: jnp.dtype | None,
    mesh: Mesh | None,
    progress: Callable[[list], Iterable] = iter,
) -> LVLM:
    """Builds the model. Each tensor is read, cast and placed directly on its devices of the mesh.

    Args: base, extra: checkpoint and glimpse tensors; dtype: of the base, None: as stored. The glimpse is float32.
    Returns: the model; whether its output head is tied is decided by the checkpoint (`BaseKeys.tied`).
    Raises: GlimpseError with the keys that do not fit, before tensors are read or the model is built.
    """
    own = BaseKeys(config, base)
    own.check_depth(config)
    if dtype is None:
        stored = next((own.keys[name] for name in (own.embedding, own.head) if name in own.keys), None)
        dtype = base.dtype(stored) if stored else jnp.float32
    config = own.tied(config, dtype)
    graph, state = nnx.split(abstract_model(config, glimpse, dtype))
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    wanted = {path: checkpoint_shape(path, v.shape, config) for path, v in variables.items()}
    optional = {own.name(p) for p in wanted if _optional(p, glimpse)}
    problems = [f"{base.where}: {len(own.twice)} in both key styles: {some(own.twice)}"] if own.twice else []
    for source, keys, chosen in ((base, own.keys, False), (extra, {k: k for k in extra.shapes} if extra else {}, True)):
        if source is not None:
            expected = {own.name(p): shape for p, shape in wanted.items() if is_glimpse(p) == chosen}
            found = {name: source.shapes[key] for name, key in keys.items()}
            if wrong := misfits(expected, found, optional):
                family = () if chosen else (own.names, config.model_type)
                problems.append(f"{source.where}: {'; '.join(wrong)}{cause(found, expected, *family)}")
            else:
                for name in expected.keys() & found.keys():
                    source.dtype(keys[name])
    if problems:
        raise GlimpseError(f"{MISFIT}: {'; '.join(problems)}")

    def place(path: str, variable: nnx.Variable) -> jax.Array:
        name, shape = own.name(path), variable.shape
        source, key = (extra, name) if is_glimpse(path) else (base, own.keys[name])
        sharding = parameter_sharding(path, shape, mesh, config.text)
        if source is None or key not in source.shapes:
            return spread(np.zeros(shape, variable.dtype), sharding)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if wanted[path] == shape:
                return source.read(key, index).astype(variable.dtype, copy=False)
            return source.read(key, ()).reshape(shape)[index].astype(variable.dtype)  # the convolution, a small one

        parts: dict[tuple, np.ndarray] = {}  # JAX asks once per device and keeps all results: devices with equal parts share one

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or ()
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
    tensors, names = {}, names_of(model.config)
    for path, value in flat_params(nnx.state((model.vision, model.decoder), nnx.Param)).items():
        path = ("vision", "decoder")[int(path[0])] + path[1:]
        name, shape = checkpoint_name(path, names.rules), checkpoint_shape(path, value.shape, model.config)
        tensors[names.nested_key(name) if nested else name] = value if value.shape == shape else value.reshape(shape)
    return tensors


def export_glimpse(model: LVLM) -> dict[str, jax.Array]:
    """The glimpse's tensors by released name; none without one. They are replicated, so any process can write them."""
    tensors: dict[str, jax.Array] = {}
    for part in ("glimpse", "predictor"):
        if (module := getattr(model, part)) is not None:
            own = flat_params(nnx.state(module, nnx.Param))
            tensors |= {checkpoint_name(f"{part}.{path}"): value for path, value in own.items()}
    return tensors


def nested_glimpse(tensors: Mapping[str, Any]) -> dict:
    """Flat released names in the nesting of the released file: one dict per module, the embeddings at the top."""
    tree: dict = {}
    for key, value in tensors.items():
        module, _, rest = key.partition(".")
        if rest:
            tree.setdefault(module, {})[rest] = value
        else:
            tree[module] = value
    return tree
