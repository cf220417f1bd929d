"""`new_modules_gp.pt` and `pytorch_model.bin` without torch: the zip-and-pickle format of `torch.save`, tensors and plain containers only.

Reading uses an unpickler that knows tensors, storages and OrderedDict and refuses every other by name, so a file cannot run code. Tensor
views are checked against their storage. Writing emits the same format, which `torch.load(weights_only=True)` reads.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gp_jax.errors import GlimpseError

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclass(frozen=True)
class _Storage:
    """The only thing a tensor may be a view of: so many values in a file."""

    path: Path
    start: int  # byte
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage, read when it is asked for."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A rectangle; () for all of it."""
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, self.storage.dtype)[index]
        values = np.memmap(self.storage.path, self.storage.dtype, "r", self.storage.start, (self.storage.count,))
        strides = tuple(s * values.itemsize for s in self.stride)
        return np.array(np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides)[index])


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> StoredTensor:
    """A tensor, refused if it would reach outside its storage or repeat values."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("a tensor is not a view of a storage")
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"a tensor has impossible sizes {size} or strides {stride}")
    count = math.prod(size)
    if not (count == 0 and max(size) <= storage.count + 2**20):
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if last >= storage.count or count > storage.count:
            raise pickle.UnpicklingError(f"a tensor of shape {size} reaches beyond its storage of {storage.count} values")
    return StoredTensor(storage, offset, size, stride)


def _rebuild_parameter(data: StoredTensor, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise pickle.UnpicklingError("a parameter is not a tensor")
    return data


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, archive: zipfile.ZipFile, prefix: str):
        super().__init__(io.BytesIO(data))
        self.archive, self.prefix, self.storages = archive, prefix, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for '{module}.{name}', which is not a tensor or plain container")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError("it holds a reference that is not a tensor storage")
        _, kind, key, _, count = pid
        if key not in self.storages:
            entry = self.archive.getinfo(f"{self.prefix}/data/{key}")
            if entry.file_size != count * kind.dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {entry.file_size} bytes, {count * kind.dtype.itemsize} expected")
            self.storages[key] = _Storage(Path(self.archive.filename), self._start(entry), kind.dtype, count)
        return self.storages[key]

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Byte of the file at which an entry's data begin: behind its own header, whose length may differ from the directory's."""
        with self.archive.open(entry), open(self.archive.filename, "rb") as file:  # opening checks the header
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            start = entry.header_offset + 30 + name + extra
            file.seek(0, io.SEEK_END)
            if start + entry.file_size > file.tell():
                raise pickle.UnpicklingError("it is truncated")
            return start


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """As `open_torch`, with all tensors read."""
    return {name: tensor[()] for name, tensor in open_torch(path).items()}


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """Opens nested dicts of tensors. Returns: flat dict, nested names joined by dots.

    Raises: GlimpseError naming the file when it is damaged, of another format, or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise pickle.UnpicklingError("it is not a file of torch.save")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise pickle.UnpicklingError("it is compressed, which torch.save never does")
            prefix = pickles[0].rsplit("/", 1)[0]
            order = f"{prefix}/byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise pickle.UnpicklingError("it is not little-endian")
            content = _Unpickler(archive.read(pickles[0]), archive, prefix).load()
        return _flatten(content)
    except Exception as error:  # a hostile file can make zipfile and pickle raise anything
        raise GlimpseError(f"{path}: cannot be read as tensors: {' '.join(str(error).split()) or type(error).__name__}") from error


def _flatten(content: Any, prefix: str = "") -> dict[str, StoredTensor]:
    if isinstance(content, StoredTensor):
        return {prefix[:-1]: content}
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"'{prefix[:-1]}' is a {type(content).__name__}, not a tensor or dict of tensors")
    flat = {}
    for name, value in content.items():
        flat |= _flatten(value, f"{prefix}{name}.")
    return flat


class _Writer:
    """Pickle opcodes (protocol 2) for dicts of tensors. Python's own pickler would have to import torch."""

    def __init__(self) -> None:
        self.out, self.storages = bytearray(b"\x80\x02"), []

    def text(self, value: str) -> None:
        data = value.encode()
        self.out += b"X" + struct.pack("<I", len(data)) + data

    def number(self, value: int) -> None:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        self.out += b"\x8a" + bytes([len(data)]) + data

    def numbers(self, values: tuple[int, ...]) -> None:
        self.out += b"("
        for value in values:
            self.number(value)
        self.out += b"t"

    def name(self, module: str, name: str) -> None:
        self.out += f"c{module}\n{name}\n".encode()

    def ordered_dict(self) -> None:
        self.name("collections", "OrderedDict")
        self.out += b")R"

    def tensor(self, array: np.ndarray) -> None:
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.out += b"(("
        self.text("storage")
        self.name("torch", STORAGE_NAMES[array.dtype])
        self.text(str(len(self.storages)))
        self.text("cpu")
        self.number(array.size)
        self.out += b"tQ"
        self.number(0)
        self.numbers(array.shape)
        self.numbers(tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)))
        self.out += b"\x89"
        self.ordered_dict()
        self.out += b"tR"
        self.storages.append(np.ascontiguousarray(array).tobytes())

    def mapping(self, content: Mapping[str, Any]) -> None:
        self.ordered_dict()
        self.out += b"("
        for name, value in content.items():
            self.text(name)
            self.mapping(value) if isinstance(value, Mapping) else self.tensor(np.asarray(value))
        self.out += b"u"


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Writes nested mappings of arrays so that `torch.load(path, weights_only=True)` gives them back as tensors.

    The same arrays give the same bytes: no date is written.
    """
    writer, prefix = _Writer(), path.name.split(".")[0]
    writer.mapping(content)
    writer.out += b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        parts = {"data.pkl": bytes(writer.out), "byteorder": "little"}
        parts |= {f"data/{key}": data for key, data in enumerate(writer.storages)} | {"version": "3\n"}
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(f"{prefix}/{name}"), data)
