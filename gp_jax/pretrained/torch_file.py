"""`new_modules_gp.pt` and `pytorch_model.bin` without torch: the zip-and-pickle format of `torch.save`, tensors and plain containers only.

The pickle is read by an interpreter that allows tensors, storages and OrderedDict only, so a file cannot run code (`pretrained.pickles`).
Tensors are immutable views, checked against their storage when they are made and when they are read. The memory that a file can make this
code allocate is bounded by the file's size. Files are written in the same format, which `torch.load(weights_only=True)` reads.
"""

import io
import math
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gp_jax.errors import GlimpseError, one_line, printable
from gp_jax.pretrained.pickles import MOST_BYTES, Machine, Refused
from gp_jax.pretrained.stored import Storage, StorageType, StoredTensor
from gp_jax.runtime.disk import check_regular

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
OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the first bytes of files of torch before 1.6, which are not zip archives
MOST_NAME = 256  # characters of a tensor's name
SHARED = 4  # tensors may together be this many times as large as the file: a tied output head shares the embedding's bytes


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, extra: Any = None) -> StoredTensor:
    if extra:  # the metadata that torch writes for conjugated or negated values
        raise Refused("a tensor carries marks that are not read")
    return StoredTensor(storage, offset, size, stride)


def _rebuild_parameter(data: Any, grad: Any, hooks: Any) -> StoredTensor:
    if type(data) is not StoredTensor:
        raise Refused("a parameter is not a tensor")
    return data


ALLOWED = {
    ("collections", "OrderedDict"): lambda: OrderedDict(),  # without arguments
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
} | {("torch", name): StorageType(dtype) for name, dtype in STORAGES.items()}


def _find(module: str, name: str) -> Any:
    if (module, name) not in ALLOWED:
        raise Refused(f"it asks for '{module}.{name}', which is not a tensor or plain container")
    return ALLOWED[module, name]


class _Bounded(io.BufferedReader):
    """A file that limits the size of a single read: zipfile reads the archive's directory of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return super().read(MOST_BYTES)
        if size > MOST_BYTES:
            raise Refused("it holds more files than a file of torch.save does")
        return super().read(size)


class _Archive:
    """The zip file: one pickle and its storages, which must not overlap."""

    def __init__(self, path: Path, file: _Bounded, archive: zipfile.ZipFile):
        self.path, self.file, self.archive = path, file, archive
        self.storages: dict[str, Any] = {}
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise Refused("it is not a file of torch.save")
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in archive.infolist()):
            raise Refused("it is compressed, which torch.save never does")
        self.prefix = pickles[0].removesuffix("data.pkl")
        if f"{self.prefix}byteorder" in names and self.small("byteorder", 16) != b"little":
            raise Refused("it is not little-endian")

    def small(self, name: str, most: int = MOST_BYTES) -> bytes:
        """The content of a small file of the archive."""
        entry = self.archive.getinfo(self.prefix + name)
        if entry.file_size > most:
            raise Refused(f"its {name} is larger than {most} bytes")
        return self.archive.read(entry)

    def storage(self, pid: Any) -> Storage:
        """The storage that a tensor refers to."""
        if not (type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and type(pid[1]) is StorageType):
            raise Refused("it holds a reference that is not a tensor storage")
        _, kind, key, _, count = pid
        if type(key) is not str or type(count) is not int or count < 0:
            raise Refused("it holds a storage without name or size")
        if key not in self.storages:
            try:
                entry = self.archive.getinfo(f"{self.prefix}data/{key}")
            except KeyError:
                raise Refused(f"it lacks the storage '{printable(key, 80)}'") from None
            if entry.file_size != count * kind.dtype.itemsize:
                raise Refused(f"storage {printable(key, 80)} has {entry.file_size} bytes, {count * kind.dtype.itemsize} expected")
            self.storages[key] = Storage(self.path, self.start(entry), kind.dtype, count)
        found = self.storages[key]
        if (found.dtype, found.count) != (kind.dtype, count):
            raise Refused(f"storage {printable(key, 80)} has two types or sizes")
        return found

    def start(self, entry: zipfile.ZipInfo) -> int:
        """Offset of an entry's data in the file: after its local header, whose length may differ from that in the directory."""
        with self.archive.open(entry):  # checks the header
            pass
        self.file.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", self.file.read(4))
        return entry.header_offset + 30 + name + extra

    def check_places(self) -> None:
        """Raises: Refused when two storages overlap, or one exceeds the end of the file."""
        end = 0
        for storage in sorted(self.storages.values(), key=lambda storage: storage.start):
            if storage.start < end:
                raise Refused("two of its storages overlap")
            end = storage.start + storage.count * storage.dtype.itemsize
        if end > self.file.seek(0, io.SEEK_END):
            raise Refused("it is truncated")


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """As `open_torch`, with all tensors read."""
    return {name: tensor[()] for name, tensor in open_torch(path).items()}


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """Opens nested dicts of tensors. Returns: flat dict, nested names joined by dots.

    Raises: GlimpseError naming the file when it is damaged, of another format, or holds anything else.
    """
    check_regular(path)
    try:
        with _Bounded(io.FileIO(path)) as file:
            if file.read(len(OLD)) == OLD:
                raise Refused("torch before version 1.6 wrote it; load it with torch and save it again")
            with zipfile.ZipFile(file) as opened:
                archive = _Archive(path, file, opened)
                content = Machine(archive.small("data.pkl"), _find, archive.storage).run()
                archive.check_places()
            tensors = _flatten(content)
            if sum(tensor.nbytes for tensor in tensors.values()) > SHARED * file.seek(0, io.SEEK_END):
                raise Refused(f"its tensors share their bytes more than {SHARED} times")
            return tensors
    except Exception as error:  # a hostile file can make zipfile raise anything
        raise GlimpseError(f"{path}: cannot be read as tensors: {one_line(error)}") from error


def _flatten(content: Any) -> dict[str, StoredTensor]:
    """Flattens nested dicts. Each dict may occur once only, so the number of names is bounded by the file."""
    flat, seen, left = {}, set(), [("", content)]
    while left:
        name, value = left.pop()
        if type(value) is StoredTensor:
            if name in flat:
                raise Refused(f"it holds two tensors called '{printable(name, 80)}'")
            flat[name] = value
        elif type(value) not in (dict, OrderedDict):
            raise Refused(f"'{printable(name, 80)}' is a {type(value).__name__}, not a tensor or dict of tensors")
        elif id(value) in seen:
            raise Refused(f"'{printable(name, 80)}' is a dict that is in another place too")
        else:
            seen.add(id(value))
            for key, inner in value.items():
                left.append((f"{name}.{key}" if name else str(key), inner))
                if len(left[-1][0]) > MOST_NAME:
                    raise Refused(f"it holds a name of more than {MOST_NAME} characters, '{printable(left[-1][0], 80)}'")
    return dict(reversed(flat.items()))


class _Writer:
    """Pickle opcodes (protocol 2) for dicts of tensors. Python's own pickler would have to import torch."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.storages: list[bytes] = []

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
    """Writes nested mappings of arrays that `torch.load(path, weights_only=True)` reads as tensors.

    Equal arrays give equal files: no date is written.
    """
    writer, prefix = _Writer(), path.name.split(".")[0]
    writer.mapping(content)
    writer.out += b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        parts: dict[str, bytes | str] = {"data.pkl": bytes(writer.out), "byteorder": "little"}
        parts |= {f"data/{key}": data for key, data in enumerate(writer.storages)} | {"version": "3\n"}
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(f"{prefix}/{name}"), data)
