"""Named tensors in files, read lazily."""

import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gp_jax.errors import GlimpseError, one_line, some
from gp_jax.pretrained.misfits import QUANTISED
from gp_jax.pretrained.stored import MOST_AXES, MOST_VALUES
from gp_jax.pretrained.torch_file import open_torch
from gp_jax.runtime.disk import check_regular, parse_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
LFS_POINTER = b"version "  # the first bytes of the text file that Git LFS puts in place of a large file
MOST_HEADER = 4 << 20  # bytes; parsed, a header takes at worst about forty times its size in memory


def _floating(dtype: Any, key: str, where: str) -> np.dtype:
    """Raises: GlimpseError unless weights of this dtype can be loaded."""
    if dtype not in DTYPES.values():
        why = QUANTISED.format("or its weights are no floating point numbers")
        raise GlimpseError(f"{where}: {key} has dtype {dtype}, supported are {', '.join(DTYPES)}. Likely cause: {why}")
    return dtype


class TensorSource(Protocol):
    """Named tensors that are read on demand, whole or in part."""

    where: str  # for error messages

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by key."""

    def dtype(self, key: str) -> np.dtype:
        """Stored dtype of a tensor. Raises: GlimpseError unless weights of this dtype can be loaded."""

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """A rectangle of a tensor; () for all of it."""


class TensorPlace(NamedTuple):
    """Place of a tensor in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte


def _entries(path: Path) -> dict[str, TensorPlace]:
    """The tensors in the header of a safetensors file. Raises: GlimpseError when the header is not valid."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            begin, size = file.read(8), os.fstat(file.fileno()).st_size - 8
            length = int.from_bytes(begin, "little")
            if begin == LFS_POINTER:
                raise ValueError("it is a pointer of Git LFS, not the file itself: git lfs pull brings it")
            if length > min(MOST_HEADER, size):
                raise ValueError(f"a header of {length} bytes in a file of {max(0, size)}")
            header = parse_json(file.read(length), "its header")
        with safe_open(path, framework="numpy"):  # the library checks types, offsets without gaps and the file's length
            pass
        header.pop("__metadata__", None)
        entries = {}
        for key, entry in header.items():  # checked again: of duplicate keys the library may use another one than Python
            (start, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), DTYPES.get(entry["dtype"])
            numbers = all(type(n) is int and n >= 0 for n in (start, end, *shape))
            numbers = numbers and len(shape) <= MOST_AXES and math.prod(max(1, n) for n in shape) <= MOST_VALUES
            if not (numbers and start <= end <= size - length) or (dtype and end - start != dtype.itemsize * math.prod(shape)):
                raise ValueError(f"{key} is not where it should be")
            entries[key] = TensorPlace(path, entry["dtype"], shape, 8 + length + start)
        return entries
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise GlimpseError(f"{path}: is not a readable safetensors file ({one_line(error)})") from error


class SafetensorsSource:
    """One or several safetensors files, checked by the library. Each tensor is mapped alone and unmapped at once: the pages of a whole
    mapped file would count as a second copy of the model."""

    def __init__(self, paths: list[Path], where: str):
        self.where, self._entries = where, joined({path: _entries(path) for path in paths})

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: entry.shape for key, entry in self._entries.items()}

    def dtype(self, key: str) -> np.dtype:
        name = self._entries[key].dtype
        return _floating(DTYPES.get(name, name), key, self.where)

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        entry = self._entries[key]
        if 0 in entry.shape:
            return np.zeros(entry.shape, self.dtype(key))[index]
        return np.array(np.memmap(entry.path, self.dtype(key), "r", entry.start, entry.shape)[index])


class TorchSource:
    """One or several files of `torch.save`: a released `new_modules_gp.pt`, or a base that was never converted."""

    def __init__(self, paths: list[Path], where: str):
        self.where, self._tensors = where, joined({path: open_torch(path) for path in paths})
        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}

    def dtype(self, key: str) -> np.dtype:
        return _floating(self._tensors[key].storage.dtype, key, self.where)

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        self.dtype(key)
        return self._tensors[key][index]


def joined(files: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """The tensors of all shards. Raises: GlimpseError when two shards hold tensors of the same name."""
    tensors: dict[str, Any] = {}
    for path, own in files.items():
        if twice := sorted(own.keys() & tensors.keys()):
            raise GlimpseError(f"{path}: holds {len(twice)} tensors that another shard holds too: {some(twice)}")
        tensors |= own
    return tensors
