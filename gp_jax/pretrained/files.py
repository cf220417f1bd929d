"""Checkpoint folders: finding them (disk or Hub), reading tensors lazily, writing them so that nothing is half-written."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gp_jax.disk import kind_of, read_json
from gp_jax.errors import GlimpseError
from gp_jax.pretrained.torch_file import open_torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
GLIMPSE_TENSORS = "glimpse.safetensors"
GLIMPSE_TORCH = "new_modules_gp.pt"
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
SHARD_BYTES = 5 * 10**9

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


BUNDLED = {"scenes": Path(__file__).parents[1] / "assets" / "scenes"}


def find_folder(name: str | os.PathLike, patterns: tuple[str, ...]) -> Path:
    """A local folder, a model that comes with this package ("scenes"), or a Hub repository's files that match `patterns`, downloaded
    once.

    Raises: GlimpseError when it is neither.
    """
    path = Path(name).expanduser()
    bundled = BUNDLED.get(str(name))
    if bundled is not None and not (path / "config.json").exists():
        return bundled
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise GlimpseError(f"{str(name)[:80]}: is not a path ({type(error).__name__})") from error
    if is_folder:
        return path
    if exists:
        raise GlimpseError(f"{path}: is a file, a model folder or Hub id is needed")
    if path.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise GlimpseError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as error:  # the Hub client raises many kinds; all mean the same to the user
        reason = " ".join(str(error).split())[:200]
        raise GlimpseError(
            f"{name}: no such folder, and the Hugging Face Hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def find_model(name: str | os.PathLike, patterns: tuple[str, ...]) -> Path:
    """As `find_folder`; of a Hub repository without safetensors its files of `torch.save` too."""
    folder = find_folder(name, patterns)
    if Path(name).expanduser() != folder and not any(folder.glob("*.safetensors")):
        return find_folder(name, (*patterns, "*.bin"))
    return folder


def _floating(dtype: Any, key: str, where: str) -> np.dtype:
    """Raises: GlimpseError unless weights of this dtype can be loaded."""
    if dtype not in DTYPES.values():
        raise GlimpseError(f"{where}: {key} has dtype {dtype}, supported are {', '.join(DTYPES)}")
    return dtype


class TensorSource(Protocol):
    """Named tensors of which only what is asked for is read."""

    where: str  # for error messages
    shapes: Mapping[str, tuple[int, ...]]

    def dtype(self, key: str) -> np.dtype:
        """Stored dtype of a tensor. Raises: GlimpseError unless weights of this dtype can be loaded."""

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """A rectangle of a tensor; () for all of it."""


class SafetensorsSource:
    """One or several safetensors files. The library checks them; each tensor is then mapped on its own and let go of at once,
    since pages of a whole mapped file would count as a second copy of the model."""

    def __init__(self, paths: list[Path], where: str):
        self.where, self._entries = where, {}
        for path in paths:
            try:
                with safe_open(path, framework="numpy"):  # validates header, offsets and length
                    pass
                with path.open("rb") as file:
                    header = int.from_bytes(file.read(8), "little")
                    entries = json.loads(file.read(header))
            except (SafetensorError, OSError, ValueError) as error:
                raise GlimpseError(f"{path}: is not a readable safetensors file ({' '.join(str(error).split())})") from error
            entries.pop("__metadata__", None)
            self._entries |= {key: (path, entry, 8 + header + entry["data_offsets"][0]) for key, entry in entries.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(entry["shape"]) for key, (_, entry, _) in self._entries.items()}

    def dtype(self, key: str) -> np.dtype:
        name = self._entries[key][1]["dtype"]
        return _floating(DTYPES.get(name, name), key, self.where)

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        path, _, offset = self._entries[key]
        if 0 in self.shapes[key]:
            return np.zeros(self.shapes[key], self.dtype(key))[index]
        return np.array(np.memmap(path, self.dtype(key), "r", offset, self.shapes[key])[index])


class TorchSource:
    """One or several files of `torch.save`: a released `new_modules_gp.pt`, or a base that was never converted."""

    def __init__(self, paths: list[Path], where: str):
        self.where, self._tensors = where, {name: tensor for path in paths for name, tensor in open_torch(path).items()}
        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}

    def dtype(self, key: str) -> np.dtype:
        return _floating(self._tensors[key].storage.dtype, key, self.where)

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        self.dtype(key)
        return self._tensors[key][index]


def base_source(folder: Path) -> TensorSource:
    """The base model's tensors: safetensors, else files of `torch.save`, in shards or one. Raises: GlimpseError naming what is missing or
    damaged."""
    for index, single, source in ((INDEX, SINGLE, SafetensorsSource), (TORCH_INDEX, TORCH_SINGLE, TorchSource)):
        if (folder / index).exists():
            weight_map = read_json(folder / index).get("weight_map")
            own = isinstance(weight_map, dict) and all(isinstance(name, str) and name == Path(name).name for name in weight_map.values())
            if not own:
                raise GlimpseError(f"{folder / index}: 'weight_map' must name a file in this folder for every tensor")
            paths = [folder / name for name in sorted(set(weight_map.values()))]
            lost = [str(path) for path in paths if not path.exists()]
            if lost:
                raise GlimpseError(f"{folder / index}: names shards that are missing: {', '.join(lost)}")
            return source(paths, str(folder))
        if (folder / single).exists():
            return source([folder / single], str(folder / single))
    raise GlimpseError(f"{folder}: holds neither {SINGLE} nor {INDEX}")


def has_glimpse(folder: Path) -> bool:
    """Whether a folder holds glimpse tensors, ours or released."""
    return (folder / GLIMPSE_TENSORS).exists() or (folder / GLIMPSE_TORCH).exists()


def glimpse_source(folder: Path) -> TensorSource:
    """The glimpse's tensors by released names: ours (safetensors) if there, else the released file."""
    if (folder / GLIMPSE_TENSORS).exists():
        return SafetensorsSource([folder / GLIMPSE_TENSORS], str(folder / GLIMPSE_TENSORS))
    if not (folder / GLIMPSE_TORCH).exists():
        raise GlimpseError(f"{folder}: holds neither {GLIMPSE_TENSORS} nor {GLIMPSE_TORCH}")
    return TorchSource([folder / GLIMPSE_TORCH], str(folder / GLIMPSE_TORCH))


def weights_digest(folder: Path, without: Collection[str] = (), blocks: int = 256, length: int = 1 << 16) -> str:
    """Of the weights in a model or glimpse folder: whole small files, evenly spread blocks of large ones; files `without` do not count."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt", ".bin") and path.name not in without):
        if kind_of(path) == "file":
            _feed(digest, path, blocks, length)
    return digest.hexdigest()[:16]


def digest_of(path: Path, blocks: int = 1024, length: int = 1 << 16) -> str:
    """Of one file: all of it up to 64 MiB, evenly spread blocks of what is larger."""
    digest = hashlib.sha256()
    _feed(digest, path, blocks, length)
    return digest.hexdigest()[:16]


def _feed(digest: Any, path: Path, blocks: int, length: int) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for start in range(0, size, max(length, size // blocks)):
            file.seek(start)
            digest.update(file.read(length))


def side_files(folder: Path) -> list[Path]:
    """Tokenizer, processor, template and generation files beside the weights."""
    named = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in named if path.name not in ("config.json", INDEX, TORCH_INDEX))


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into `folder` when the block ends well, and vanish when it does not."""
    if folder.exists() and not folder.is_dir():
        raise GlimpseError(f"{folder}: exists and is not a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise GlimpseError(f"{folder}: cannot be written ({error.strerror or error})") from error
    try:
        yield scratch
        folder.mkdir(exist_ok=True)
        for path in sorted(scratch.iterdir()):
            path.chmod(0o644)  # scratch files are private
            os.replace(path, folder / path.name)
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
    """One safetensors file, marked as Hugging Face marks them."""
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path, metadata={"format": "pt"})


def remove_stale_weights(folder: Path, fresh: set[str]) -> None:
    """Deletes weight files of an earlier save that are not part of this one; only names that a save itself writes."""
    ours = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + "|".join(map(re.escape, (INDEX, GLIMPSE_TENSORS, GLIMPSE_TORCH))))
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name not in fresh:
            path.unlink()
