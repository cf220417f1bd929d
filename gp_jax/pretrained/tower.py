"""The vision tower that a LLaVA checkpoint names (`mm_vision_tower`): its config, and its weights if the checkpoint has none."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gp_jax.config.model import ModelConfig
from gp_jax.errors import GlimpseError, shown
from gp_jax.pretrained import files
from gp_jax.pretrained.names import checkpoint_name, names_of
from gp_jax.runtime.disk import kind_of, path_of, read_json

NAME, PROCESSOR = "mm_vision_tower", "preprocessor_config.json"
# Checkpoints on the Hub contain this tower's weights; with its config here nothing else must be downloaded.
KNOWN = {
    "openai/clip-vit-large-patch14-336": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
}


def local_tower(name: str, folder: Path) -> Path | None:
    """The tower's folder on disk: inside the checkpoint's folder or beside it, by its whole name or its last part, or the name as a path.

    Raises: GlimpseError that names the field when the name is not a valid path.
    """
    with _naming(folder):
        path = path_of(name)
        places = (folder / path, folder / path.name, folder.parent / path, folder.parent / path.name, path)
        return next((place for place in places if kind_of(place / "config.json") == "file"), None)


def local_tower_of(folder: Path) -> Path | None:
    """The folder of the tower that a checkpoint refers to, if it is on disk."""
    name = read_json(folder / "config.json", required=False).get(NAME)
    return local_tower(name, folder) if isinstance(name, str) else None


def find_tower(name: str, folder: Path, weights: bool) -> Path:
    """The tower's folder, on disk or from the Hub (or its cache). Raises: GlimpseError that names the field."""
    if place := local_tower(name, folder):
        return place
    with _naming(folder):
        return files.find_model(name, ("*.json", "*.safetensors")) if weights else files.find_folder(name, ("*.json",))


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except GlimpseError as error:
        raise GlimpseError(f"{folder / 'config.json'}: {NAME}: {error}") from error


def with_tower(hf: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The checkpoint's `config.json` with the tower's own as `vision_config`."""
    name = hf.get(NAME)
    if not isinstance(name, str):
        raise GlimpseError(f"{folder / 'config.json'}: {NAME}={shown(name)} must be a folder or a Hub id")
    if isinstance(hf.get("vision_config"), Mapping):
        return dict(hf)
    if name in KNOWN and local_tower(name, folder) is None:
        return {**hf, "vision_config": KNOWN[name]}
    own = read_json(find_tower(name, folder, weights=False) / "config.json")
    return {**hf, "vision_config": own.get("vision_config", own)}


def processor_file(folder: Path) -> list[Path]:
    """For a checkpoint without its own, the `preprocessor_config.json` of the tower that it refers to: on disk, or from the Hub if the
    tower's config is from there too."""
    if (folder / PROCESSOR).exists():
        return []
    name, place = read_json(folder / "config.json", required=False).get(NAME), local_tower_of(folder)
    if place is None and isinstance(name, str) and name not in KNOWN:
        with contextlib.suppress(GlimpseError):
            place = find_tower(name, folder, weights=False)
    return [place / PROCESSOR] if place and (place / PROCESSOR).exists() else []


def copy_beside(source: Path, folder: Path) -> None:
    """Copies everything that a model needs besides its weights and its `config.json`."""
    for path in files.side_files(source):
        place = folder / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    for path in processor_file(source):
        shutil.copyfile(path, folder / path.name)


def base_source(folder: Path, config: ModelConfig) -> files.TensorSource:
    """The base model's tensors; the tower's are from its own folder if the checkpoint has none."""
    base, name = files.base_source(folder), read_json(folder / "config.json").get(NAME)
    if name is None:
        return base
    prefix = checkpoint_name("vision.class_embedding", names_of(config).rules).removesuffix("embeddings.class_embedding")
    if any(key.startswith(prefix) for key in base.shapes):
        return base
    own = files.base_source(find_tower(name, folder, weights=True))
    keys = {key: key.removeprefix("vision_model.") for key in own.shapes}  # transformers 5 leaves the prefix out
    if any(key.startswith("text_model.") for key in own.shapes):  # a complete CLIP: its text tower and projections are not used
        keys = {key: short for key, short in keys.items() if short != key}
    return Joined(base, own, {prefix + short: key for key, short in keys.items()})


class Joined:
    """Two sources as one. names: key -> key of the second."""

    def __init__(self, first: files.TensorSource, second: files.TensorSource, names: Mapping[str, str]):
        self.where, self.first, self.second, self.names = f"{first.where} with {second.where}", first, second, names
        self.shapes = {**first.shapes, **{key: second.shapes[own] for key, own in names.items()}}

    def dtype(self, key: str) -> np.dtype:
        """As of `files.TensorSource`."""
        return self.second.dtype(self.names[key]) if key in self.names else self.first.dtype(key)

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """As of `files.TensorSource`."""
        return self.second.read(self.names[key], index) if key in self.names else self.first.read(key, index)
