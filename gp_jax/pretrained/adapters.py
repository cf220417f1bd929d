"""LoRA adapters in PEFT's files: `adapter_config.json` with `adapter_model.safetensors`, or `adapter_model.bin` of older versions.

r rank, I and O the inputs and outputs of a linear layer: `lora_A` is (r, I) and `lora_B` (O, r).
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gp_jax.config.model import ModelConfig
from gp_jax.errors import GlimpseError, some
from gp_jax.models.adapter import AdapterConfig, adapted, forms, module_at, module_names
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import LowRank
from gp_jax.pretrained import files
from gp_jax.pretrained.adapter_config import meant, read_settings, written
from gp_jax.pretrained.names import checkpoint_name, names_of
from gp_jax.pretrained.params import abstract_model, shallow
from gp_jax.runtime.disk import kind_of, read_json
from gp_jax.sharding import fetch, parameter_sharding, spread

ADAPTER_FILES = (files.ADAPTER, *files.ADAPTER_WEIGHTS, files.NOT_LORA)  # what is looked at in a folder or a Hub repository
KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
HALVES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a folder, checked against a model's configuration. keys: half and dotted path here -> key of its tensor."""

    source: files.TensorSource
    config: AdapterConfig
    keys: dict[tuple[str, str], str]

    @classmethod
    def open(cls, folder: Path, model: ModelConfig) -> "StoredAdapter":
        """Reads the settings and checks everything, every value too. Raises: GlimpseError that names file, field or tensors."""
        place, source = folder / files.ADAPTER, adapter_source(folder)
        hf = read_json(place)
        config, layers = read_settings(hf, str(place)), model.text.num_hidden_layers
        found = cls(source, config, keys_of(source, layers))
        here = {path for _, path in found.keys}
        wanted = meant(hf, layers, str(place))
        own = {path: name for name, path in module_names(layers)}
        for names, words in (
            (here - wanted, "holds {} layers that target_modules does not name"),
            (wanted - here, "lacks {} layers of target_modules"),
        ):
            if names:
                listed = some(name for path, name in own.items() if path in names)
                raise GlimpseError(f"{source.where}: {words.format(len(names))} ({place.name}): {listed}")
        found.check(linear_shapes(model))
        return found

    def check(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Checks shapes, types and values. shapes: (O, I) by the name of a linear layer. Raises: GlimpseError that names the tensor."""
        rank = self.config.r
        for (half, path), key in self.keys.items():
            size_out, size_in = shapes[path.split(".", 3)[-1]]
            expected = (rank, size_in) if half == HALVES[0] else (size_out, rank)
            if (shape := self.source.shapes[key]) != expected:
                raise GlimpseError(f"{self.source.where}: {key} has the shape {list(shape)}, with r={rank} it must be {list(expected)}")
            self.source.dtype(key)
        for half, path in self.keys:
            if not np.isfinite(self.read(half, path)).all():
                raise GlimpseError(f"{self.source.where}: {self.keys[half, path]} holds values that are not finite")

    def read(self, half: str, path: str) -> np.ndarray:
        """A tensor in float32."""
        with np.errstate(over="ignore"):  # of float64; `check` finds it
            return self.source.read(self.keys[half, path], ()).astype(np.float32)

    def attach(self, model: LVLM, mesh: Mesh | None, progress: Callable[[list], Iterable] = iter) -> None:
        """Gives a model this adapter. Each tensor is read and placed directly on its devices of the mesh."""
        config = self.config
        for path in progress(sorted({path for _, path in self.keys})):
            linear = module_at(model, path)
            size_out, size_in = linear.weight.shape
            adapter = empty(size_in, size_out, config)
            for half in HALVES:
                value, name = self.read(half, path), f"{path}.adapter.{half}"
                getattr(adapter, half).set_raw_value(spread(value, parameter_sharding(name, value.shape, mesh, model.config.text)))
            linear.adapter = nnx.data(adapter)


def empty(size_in: int, size_out: int, config: AdapterConfig) -> LowRank:
    """An adapter's layer with shapes instead of arrays."""
    return nnx.eval_shape(lambda: LowRank(size_in, size_out, config.r, config.scale, config.lora_dropout, rngs=nnx.Rngs(0)))


def adapter_source(folder: Path) -> files.TensorSource:
    """The tensors of a folder's adapter. Raises: GlimpseError that names what is missing."""
    if kind_of(folder / files.NOT_LORA) is not None:
        raise GlimpseError(f"{folder / files.NOT_LORA}: weights beside the adapter are not supported")
    safetensors, torch = (folder / name for name in files.ADAPTER_WEIGHTS)
    if kind_of(safetensors) is not None:
        return files.SafetensorsSource([safetensors], str(safetensors))
    if kind_of(torch) is not None:
        return files.TorchSource([torch], str(torch))
    raise GlimpseError(f"{folder}: holds neither {' nor '.join(files.ADAPTER_WEIGHTS)}")


def keys_of(source: files.TensorSource, layers: int) -> dict[tuple[str, str], str]:
    """The keys of an adapter's tensors, by half and dotted path here. Raises: GlimpseError that names tensors which are none, and layers
    that are there twice or by half."""
    known = {form: path for name, path in module_names(layers) for form in forms(name)}
    keys: dict[tuple[str, str], str] = {}
    strange, twice = [], []
    for key in source.shapes:
        parts = KEY.fullmatch(key)
        path = known.get(parts[1]) if parts else None
        if parts is None or path is None:
            strange.append(key)
        elif (parts[2], path) in keys:
            twice.append(key)
        else:
            keys[parts[2], path] = key
    if strange:
        what = f"holds {len(strange)} tensors that are not lora_A.weight or lora_B.weight of a linear layer of this model's decoder"
        raise GlimpseError(f"{source.where}: {what} ({layers} layers): {some(strange)}")
    if twice:
        raise GlimpseError(f"{source.where}: {len(twice)} tensors are there by two names: {some(twice)}")
    halves = [key for (half, path), key in keys.items() if any((other, path) not in keys for other in HALVES)]
    if halves or not keys:
        raise GlimpseError(
            f"{source.where}: " + (f"{len(halves)} tensors lack their other half: {some(halves)}" if halves else "holds no tensors")
        )
    return keys


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(O, I) of the linear layers of a decoder layer, by their names in it."""
    model = abstract_model(shallow(config), None, jnp.float32)
    layers = {path.split(".", 3)[-1]: module_at(model, path) for _, path in module_names(1)}
    return {name: (layer.weight.shape[0], layer.weight.shape[1]) for name, layer in layers.items()}


def save_adapter(model: LVLM, folder: Path, base_name: str | None, mesh: Mesh | None = None) -> None:
    """Writes a model's adapter as PEFT does, with the module names of transformers 4.52 and later. If the mesh spans processes, all of them
    must call it; the first writes.

    `use_rslora` is not written: lora_alpha is the number with which lora_alpha / r is the adapter's scale.
    Raises: GlimpseError without an adapter, or for layers with different settings, which the files could not say.
    """
    layers = dict(adapted(model))
    settings = {(one.lora_A.shape[0], one.scale, one.dropout) for linear in layers.values() if (one := linear.adapter) is not None}
    if len(settings) != 1:
        why = "its layers differ in rank, scale or dropout" if settings else "there is none"
        raise GlimpseError(f"{folder}: the model's adapter cannot be written, {why}")
    ((rank, scale, dropout),) = settings
    names = names_of(model.config)
    modules = {path: names.nested_key(checkpoint_name(path, names.rules)) for path in layers}
    arrays = {
        f"base_model.model.{modules[path]}.{half}.weight": getattr(linear.adapter, half)[...]
        for path, linear in layers.items()
        for half in HALVES
    }
    tensors = fetch(arrays, mesh)
    if jax.process_index() != 0:
        return
    alpha = round(scale * rank, 9)
    config = AdapterConfig(r=rank, lora_alpha=int(alpha) if alpha == int(alpha) else scale * rank, lora_dropout=dropout)
    with files.staged(folder) as scratch:
        files.write_tensors(scratch / files.ADAPTER_WEIGHTS[0], tensors)
        said = written(config, sorted(modules.values()), base_name)
        (scratch / files.ADAPTER).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
