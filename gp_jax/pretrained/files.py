"""Checkpoint folders: finding them (disk or Hub), reading tensors lazily, writing files atomically."""

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gp_jax.errors import GlimpseError, one_line, shown, some
from gp_jax.pretrained.sources import SafetensorsSource, TensorSource, TorchSource
from gp_jax.runtime.disk import kind_of, path_of, read_json, reading, writing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
NOT_LORA = "non_lora_trainables.bin"  # LLaVA's own training writes other weights that it has changed beside an adapter
CHOSEN = "transformers_weights"  # field of config.json that names another weights file
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
GLIMPSE_TENSORS = "glimpse.safetensors"
GLIMPSE_TORCH = "new_modules_gp.pt"
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja")
SHARD_BYTES = 5 * 10**9

BUNDLED = {"scenes": Path(__file__).parent / "bundled" / "scenes"}
BUNDLED_GLIMPSES = {name: Path(__file__).parent / "bundled" / name.replace("-", "_") for name in ("scenes-looks", "scenes-plus")}
BUNDLED_TUNED = {"scenes-plus": "scenes"}  # the base of a folder that holds an adapter beside its glimpse


def find_folder(name: str | os.PathLike, patterns: tuple[str, ...]) -> Path:
    """A local folder, a bundled model ("scenes"), or the files of a Hub repository that match `patterns`, downloaded once.

    Raises: GlimpseError when it is none of these.
    """
    path = path_of(name)
    bundled = (BUNDLED | BUNDLED_GLIMPSES).get(str(name))
    if bundled is not None and kind_of(path / "config.json") is None:
        return bundled
    kind = kind_of(path)
    if kind == "folder":
        return path
    if kind is not None:
        raise GlimpseError(f"{path}: is no folder, a model folder or Hub id is needed")
    if path.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        near = difflib.get_close_matches(str(name), [*BUNDLED, *BUNDLED_TUNED], n=1)
        raise GlimpseError(f"{name}: no such folder" + (f"; did you mean '{near[0]}', the bundled model?" if near else ""))
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as error:  # the Hub client raises many types of errors
        why = f"{type(error).__name__}: {one_line(error)}"
        raise GlimpseError(f"{name}: no such folder, and the Hugging Face Hub did not give it ({why})") from error


def parts_of(
    model: str | os.PathLike, glimpse: str | os.PathLike | None, adapter: str | os.PathLike | None
) -> tuple[str | os.PathLike, str | os.PathLike | None, str | os.PathLike | None]:
    """Base, glimpse and adapter that a model's name stands for: a bundled tuned model ("scenes-plus") is a base with the other two.

    Raises: GlimpseError for a second adapter.
    """
    base = BUNDLED_TUNED.get(str(model))
    if base is None or kind_of(path_of(model) / "config.json") is not None:
        return model, glimpse, adapter
    if adapter is not None:
        raise GlimpseError(f"{model}: has an adapter of its own; name its base, '{base}', to use {adapter}")
    return base, model if glimpse is None else glimpse, model


def find_model(name: str | os.PathLike, patterns: tuple[str, ...]) -> Path:
    """As `find_folder`; for a Hub repository without safetensors also its files of `torch.save`."""
    folder = find_folder(name, patterns)
    if path_of(name) != folder and not any(folder.glob("*.safetensors")):
        return find_folder(name, (*patterns, "*.bin"))
    return folder


def check_merged(folder: Path) -> None:
    """Raises: GlimpseError for the folder of an adapter where a model is needed."""
    if kind_of(folder / ADAPTER) and any(kind_of(folder / name) for name in ADAPTER_WEIGHTS):
        raise GlimpseError(
            f"{folder}: holds a LoRA adapter ({ADAPTER}) that is not merged; name its base as the model and this folder as its adapter "
            "(--adapter), or add it to the weights: gp-jax merge BASE --adapter FOLDER --to DIR"
        )


def base_source(folder: Path) -> TensorSource:
    """The base model's tensors, from the first of these that exists, as in transformers: the file that `config.json` names, one
    safetensors file, safetensors in shards, one file of `torch.save`, such files in shards. An index is ignored beside a single file.

    Raises: GlimpseError naming what is missing or damaged.
    """
    if (chosen := read_json(folder / "config.json", required=False).get(CHOSEN)) is not None:
        return chosen_source(folder, chosen)
    for single, index, source in ((SINGLE, INDEX, SafetensorsSource), (TORCH_SINGLE, TORCH_INDEX, TorchSource)):
        if kind_of(folder / single):
            return source([folder / single], str(folder / single))
        if kind_of(folder / index):
            return source(shards(folder / index), str(folder))
    other = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
    raise GlimpseError(f"{folder}: holds neither {SINGLE} nor {INDEX}" + (f", only {some(other)}" if other else ""))


def chosen_source(folder: Path, name: Any) -> TensorSource:
    """The tensors of the file that `config.json` names, as in transformers."""
    if not (isinstance(name, str) and name == Path(name).name and name.endswith((".safetensors", ".safetensors.index.json"))):
        raise GlimpseError(f"{folder / 'config.json'}: {CHOSEN}={shown(name)} must name a safetensors file, or its index, in this folder")
    path = folder / name
    return SafetensorsSource(shards(path) if name.endswith(".json") else [path], str(path))


def shards(index: Path) -> list[Path]:
    """The files that an index names. Which tensor it assigns to which file is not used, as in transformers."""
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and all(isinstance(n, str) for n in weight_map.values()) else set()
    if not names or not all(name == Path(name).name for name in names):
        raise GlimpseError(f"{index}: 'weight_map' must name a file in this folder for every tensor")
    lost = [name for name in sorted(names) if kind_of(index.parent / name) is None]
    if lost:
        raise GlimpseError(f"{index}: names shards that are missing: {some(lost)}")
    return [index.parent / name for name in sorted(names)]


def has_glimpse(folder: Path) -> bool:
    """Whether a folder holds glimpse tensors, ours or released."""
    return kind_of(folder / GLIMPSE_TENSORS) is not None or kind_of(folder / GLIMPSE_TORCH) is not None


def glimpse_source(folder: Path) -> TensorSource:
    """The glimpse's tensors by released names: of `glimpse.safetensors` if it exists, else of the released file (`new_modules_gp.pt`).

    A save writes both. If they differ, something else has replaced one of them since: that gives a warning.
    """
    ours, released = folder / GLIMPSE_TENSORS, folder / GLIMPSE_TORCH
    if kind_of(ours) is None and kind_of(released) is None:
        raise GlimpseError(f"{folder}: holds neither {GLIMPSE_TENSORS} nor {GLIMPSE_TORCH}")
    if kind_of(ours) is None:
        return TorchSource([released], str(released))
    source = SafetensorsSource([ours], str(ours))
    if kind_of(released) is not None and not _same(source, released):
        warnings.warn(f"{ours} is used; {GLIMPSE_TORCH} beside it holds another glimpse. Remove the one that is not meant", stacklevel=2)
    return source


def _same(source: TensorSource, released: Path) -> bool:
    try:
        other = TorchSource([released], str(released))
        alike = source.shapes == other.shapes
        return alike and all(np.array_equal(np.float32(source.read(k, ())), np.float32(other.read(k, ()))) for k in source.shapes)
    except GlimpseError:  # an unreadable file that is not used
        return False


def weights_digest(folder: Path, without: Collection[str] = (), blocks: int = 256, length: int = 1 << 16) -> str:
    """A digest of a folder's weights: of whole small files and of evenly spread blocks of large ones, except files `without`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt", ".bin") and path.name not in without):
        if kind_of(path) == "file":
            _feed(digest, path, blocks, length)
    return digest.hexdigest()[:16]


def digest_of(path: Path, blocks: int = 1024, length: int = 1 << 16) -> str:
    """A digest of one file: of all of it up to 64 MiB, of evenly spread blocks if it is larger."""
    digest = hashlib.sha256()
    _feed(digest, path, blocks, length)
    return digest.hexdigest()[:16]


def _feed(digest: Any, path: Path, blocks: int, length: int) -> None:
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{path.name} {size}".encode())
        for start in range(0, size, max(length, size // blocks)):
            file.seek(start)
            digest.update(file.read(length))


def side_files(folder: Path) -> list[Path]:
    """Tokenizer, processor, template and generation files beside the weights."""
    named = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in named if path.name not in ("config.json", INDEX, TORCH_INDEX, ADAPTER))


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a scratch folder whose files are moved into `folder` if the block succeeds, and deleted if it fails."""
    if folder.exists() and not folder.is_dir():
        raise GlimpseError(f"{folder}: exists and is not a folder")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with writing(folder):
            yield scratch
            folder.mkdir(exist_ok=True)
            for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
                path.chmod(0o644)  # scratch files are private
                place = folder / path.relative_to(scratch)
                place.parent.mkdir(exist_ok=True)
                os.replace(path, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_shards(folder: Path, tensors: Mapping[str, Any], shard_bytes: int = SHARD_BYTES, progress: Callable = iter) -> None:
    """Writes tensors as Hugging Face safetensors, in shards of at most `shard_bytes`; one shard is in memory at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for key in tensors:
        bytes_here = tensors[key].nbytes
        if shards[-1] and size + bytes_here > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += bytes_here
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, keys in progress(list(zip(names, shards, strict=True))):
        write_tensors(folder / name, {key: tensors[key] for key in keys})
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(tensors[key].nbytes for key in tensors)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes one safetensors file with Hugging Face's metadata. Raises: GlimpseError that names it, e.g. when the disk is full."""
    try:
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise GlimpseError(f"{path}: cannot be written ({one_line(error)})") from error


def remove_stale_weights(folder: Path, fresh: set[str]) -> None:
    """Deletes weight files of an earlier save that are not part of this one; only files with names that a save writes."""
    ours = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + "|".join(map(re.escape, (INDEX, GLIMPSE_TENSORS, GLIMPSE_TORCH))))
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name not in fresh:
            path.unlink()
