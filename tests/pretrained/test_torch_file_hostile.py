"""Torch files that were written to harm: one clear line each, at once, with no more memory than the file is large."""

import io
import os
import pickletools
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from gp_jax import GlimpseError
from gp_jax.pretrained import pickles
from gp_jax.pretrained.stored import Storage, StoredTensor
from gp_jax.pretrained.torch_file import open_torch, read_torch

FOUR = np.arange(4, dtype=np.float32).tobytes()
STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"
ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(
    size: bytes, stride: bytes, offset: bytes = b"K\x00", count: bytes = b"K\x04", hooks: bytes = ORDERED, rest: bytes = b""
) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + STORAGE % count + offset + size + stride + b"\x89" + hooks + rest + b"tR"


GOOD = tensor(numbers(2, 2), numbers(2, 1))


def item(name: str, value: bytes) -> bytes:
    return text(name) + value + b"s"


def write(path, payload: bytes, **files: bytes):
    """An archive of torch.save with this pickle (a dict lies on the stack, `.` follows)."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}" + payload + b".")
        for name, data in ({"0": FOUR} | {name.removeprefix("s"): data for name, data in files.items()}).items():
            archive.writestr(f"x/data/{name}", data)
    return path


def refused(path, match: str) -> None:
    """One line, within a second, without memory."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with pytest.raises(GlimpseError, match=match) as error:
            for stored in open_torch(path).values():
                stored[()]
        assert time.monotonic() - begun < 5, "without tracing it is less than one"
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + (64 << 20)
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and str(error.value).startswith(str(path))


def test_what_the_other_tests_change_is_read(tmp_path):
    path = write(tmp_path / "x.pt", item("a", GOOD))
    np.testing.assert_array_equal(read_torch(path)["a"], [[0, 1], [2, 3]])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_of_modules_carry_attributes(tmp_path, protocol):
    """Real `.bin` files hold an OrderedDict with `_metadata`, which opcode BUILD sets."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "x.bin", pickle_protocol=protocol)
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        assert any(code.name == "BUILD" for code, _, _ in pickletools.genops(archive.read("x/data.pkl")))
    found = read_torch(tmp_path / "x.bin")
    assert found.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(found[name], value)


STATE = b"}" + item("shape", numbers(9, 9))
BUILDS = {
    "tensor": item("a", GOOD + STATE + b"b"),
    "tensor, with slots": item("a", GOOD + b"N" + STATE + b"\x86b"),
    "storage": item("a", b"ctorch._utils\n_rebuild_tensor_v2\n" + STORAGE % b"K\x04" + STATE + b"b" + b"K\x00))\x89)tR"),
    "dict": item("a", b"}" + STATE + b"b"),
    "text": item("a", text("x") + STATE + b"b"),
    "function": item("a", b"ctorch._utils\n_rebuild_tensor_v2\n" + STATE + b"b"),
    "type": item("a", b"ctorch\nFloatStorage\n" + STATE + b"b"),
    "OrderedDict, no dict": item("a", ORDERED + b"K\x01b"),
    "OrderedDict, with slots": item("a", ORDERED + b"N" + STATE + b"\x86b"),
}


@pytest.mark.parametrize("payload", BUILDS.values(), ids=BUILDS)
def test_nothing_that_was_checked_is_changed(tmp_path, payload):
    refused(write(tmp_path / "x.pt", payload), "opcode BUILD")


def test_values_cannot_be_changed():
    stored = StoredTensor(Storage("x", 0, np.dtype(np.float32), 4), 0, (2,), (1,))
    for thing, name in ((stored, "stride"), (stored.storage, "path")):
        assert not hasattr(thing, "__dict__")
        with pytest.raises(FrozenInstanceError):
            setattr(thing, name, (9,))
    object.__setattr__(stored, "stride", (99,))
    with pytest.raises(pickles.Refused, match="reaches beyond"):
        stored[()]


def test_only_the_opcodes_of_torch_save(tmp_path):
    """Every other one is refused by its name, wherever it stands."""
    others = [code for code in pickletools.opcodes if code.code.encode("latin-1") not in pickles.ACTIONS and code.name != "STOP"]
    assert {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT4", "DUP", "LONG4", "PUT", "GET", "BINBYTES8"} <= {
        code.name for code in others
    }
    for code in others:
        refused(write(tmp_path / "x.pt", code.code.encode("latin-1") + b"\xff" * 8), f"holds the opcode {code.name},")
    refused(write(tmp_path / "x.pt", b"\xff"), "holds the opcode ff,")


CODE = {
    "os.system": b"cos\nsystem\n" + text("true") + b"\x85R",
    "builtins.eval by texts": text("builtins") + text("eval") + b"\x93" + text("1") + b"\x85R",
    "getattr": b"c__builtin__\ngetattr\n)R",
    "storage type": b"ctorch\nFloatStorage\n)R",
    "dict": b"})R",
    "OrderedDict of arguments": b"ccollections\nOrderedDict\n]\x85R",
    "no tuple": b"ccollections\nOrderedDict\n]R",
    "name that is a number": b"K\x01K\x02\x93",
    "name without end": b"c" + b"x" * 5000,
}


@pytest.mark.parametrize("value", CODE.values(), ids=CODE)
def test_nothing_else_is_called(tmp_path, value):
    refused(write(tmp_path / "x.pt", item("a", value)), "asks for|calls what|argument|names a class|without end")


BIG = integer(2**62)
NUMBERS = {
    "65 axes": tensor(numbers(*[1] * 65), numbers(*[1] * 65)),
    "a million axes": tensor(b"(" + b"K\x01" * 20_000 + b"t", b"(" + b"K\x01" * 20_000 + b"t"),
    "huge strides": tensor(numbers(2, 2), numbers(2**62, 1)),
    "strides that wrap": tensor(numbers(2, 2), numbers(2**64 - 2, 1)),
    "huge sizes with 0": tensor(numbers(0, 2**62), numbers(1, 1)),
    "sizes whose product is huge": tensor(numbers(0, *[2**40] * 20), numbers(*[1] * 21)),
    "negative size": tensor(numbers(-1), numbers(1)),
    "negative offset": tensor(numbers(1), numbers(1), offset=integer(-1)),
    "huge offset": tensor(numbers(1), numbers(1), offset=BIG),
    "fractional offset": tensor(numbers(1), numbers(1), offset=b"G" + struct.pack(">d", 0.0)),
    "fractional count": tensor(numbers(2, 2), numbers(2, 1), count=b"G" + struct.pack(">d", 4.0)),
    "nan count": tensor(numbers(1), numbers(1), count=b"G" + struct.pack(">d", float("nan"))),
    "count true": tensor(numbers(1), numbers(1), count=b"\x88"),
    "negative count": tensor(numbers(1), numbers(1), count=integer(-4)),
    "size true": tensor(b"\x88\x85", b"\x88\x85"),
    "fractional size": tensor(b"G" + struct.pack(">d", 1.0) + b"\x85", b"K\x01\x85"),
    "sizes none": tensor(b"N", b"N"),
    "sizes a list": tensor(b"]K\x01a", b"]K\x01a"),
    "tuples of tuples": tensor(b")" + b"q\x00h\x00\x86" * 60, b")" + b"q\x00h\x00\x86" * 60),
    "marks": tensor(numbers(2, 2), numbers(2, 1), rest=b"}" + item("neg", b"\x88")),
    "no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89)tR",
    "parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n(N\x88)tR",
}


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS)
def test_numbers_without_sense(tmp_path, value):
    refused(write(tmp_path / "x.pt", item("a", value)), "impossible|reaches beyond|without name or size|not a view|marks|is not a tensor")


def test_zero_sizes_are_read(tmp_path):
    path = write(tmp_path / "x.pt", item("a", tensor(numbers(0, 7), numbers(7, 1))))
    assert read_torch(path)["a"].shape == (0, 7)


MIB = 1 << 20
DEEP = b")" + b"\x85" * 20_000
BOMBS = {
    "memo index": b"r" + struct.pack("<I", 2**28) + item("a", GOOD),
    "memo index of all bits": b"r\xff\xff\xff\xff",
    "deep key": DEEP + GOOD + b"s",
    "deep value": item("a", DEEP),
    "deep lists": item("a", b"]" * 20_000 + b"a" * 19_999),
    "deep dicts": b"".join(text("k") + b"}" for _ in range(20_000)) + b"s" * 20_000,
    "number as a dict's key of any kind": b"N" + GOOD + b"s",
    "marks": b"(" * 200_000,
    "empty dicts": item("a", b"]" + b"(" + b"}" * 50_000 + b"e"),
    "endless": b"}" * (pickles.MOST_STEPS + 1),
    "longer than any": b"}" * (pickles.MOST_BYTES + 1),
    "long name": item("x" * MIB, GOOD),
    "long names by nesting": b"".join(text("x" * 200) + b"}" for _ in range(100)) + text("x") + GOOD + b"s" * 101,
    "text of 4 GiB": b"X\xff\xff\xff\xff",
    "a dict in itself": b"q\x00" + text("a") + b"h\x00s",
    "a dict in two places": text("a") + b"}q\x00s" + text("b") + b"h\x00s",
    "two tensors of one name": item("a.b", GOOD) + text("a") + b"}" + item("b", GOOD) + b"s",
    "too few values": b"sss",
    "no mark": b"t",
    "nothing remembered": b"h\x09",
}


@pytest.mark.parametrize("payload", BOMBS.values(), ids=BOMBS)
def test_bombs(tmp_path, payload):
    refused(write(tmp_path / "x.pt", payload), "cannot be read as tensors")


def test_dicts_that_hold_each_other(tmp_path):
    """Ten times each, twenty deep: 10**20 names."""
    inner = (b"".join(text(f"k{n}") + b"h" + bytes([level]) + b"s" for n in range(10)) for level in range(19))
    payload = b"q\x00" + b"".join(b"}q" + bytes([level + 1]) + items for level, items in enumerate(inner))
    refused(write(tmp_path / "x.pt", payload), "in another place too")


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


PICKLE = b"\x80\x02}" + item("a", GOOD) + b"."


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives(tmp_path):
    path, good = tmp_path / "x.pt", [("x/data.pkl", PICKLE), ("x/data/0", FOUR)]
    assert read_torch(archive(path, good)).keys() == {"a"}
    refused(archive(path, [*good, ("x/data/0", FOUR)]), "not a file of torch.save")
    refused(archive(path, [*good, ("y/data.pkl", PICKLE)]), "not a file of torch.save")
    refused(archive(path, [*good, ("x/byteorder", b"big")]), "little-endian")
    refused(archive(path, [*good, ("x/byteorder", b"l" * 100)]), "byteorder is larger")
    refused(archive(path, good[:1]), "lacks the storage '0'")
    refused(archive(path, [("x/data.pkl", b"\x80\x02}" + b" " * (pickles.MOST_BYTES + 1))]), "data.pkl is larger")
    refused(archive(path, good, zipfile.ZIP_DEFLATED), "compressed")
    refused(archive(path, [*good, *((f"x/{i:0>60}", b"") for i in range(50_000))]), "more files")


def test_storages_that_overlap(tmp_path):
    """Many gigabytes out of few: an entry whose header lies in another one's data."""
    header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 33, zlib.crc32(FOUR), 16, 16, 8, 0) + b"x/data/1"
    outer = (header + FOUR).ljust(64, b"\0")
    views = item("a", GOOD.replace(b"cpuK\x04", b"cpuK\x10")) + item("b", GOOD.replace(b"\x01\x00\x00\x000", b"\x01\x00\x00\x001"))
    path = archive(tmp_path / "x.pt", [("x/data.pkl", b"\x80\x02}" + views + b"."), ("x/data/0", outer), ("x/data/1", FOUR)])
    assert len(read_torch(path)) == 2
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02") + 42  # where the directory says that entry 1 begins
    data[place : place + 4] = struct.pack("<I", data.index(outer))
    path.write_bytes(data)
    refused(path, "overlap")


def test_tensors_that_share_bytes(tmp_path):
    """An embedding that is the output head too is fine; a thousand tensors of the same bytes are not."""
    large = {"s0": bytes(4096)}
    view = tensor(numbers(32, 32), numbers(32, 1), count=integer(1024))
    for copies, fits in ((2, True), (200, False)):
        shared = b"(" + b"".join(b"K" + bytes([n]) + b"h\x00" for n in range(copies)) + b"u"
        path = write(tmp_path / "x.pt", text("first") + view + b"q\x00s" + shared, **large)
        if fits:
            assert len(read_torch(path)) == copies + 1
        else:
            refused(path, "share their bytes")


def test_one_storage_is_one_type(tmp_path):
    other = GOOD.replace(b"FloatStorage", b"IntStorage")
    refused(write(tmp_path / "x.pt", item("a", GOOD) + item("b", other)), "two types")


def test_old_files_and_no_files(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "before version 1.6")
    path.unlink()
    with pytest.raises(GlimpseError, match="file is missing"):
        open_torch(path)
    path.mkdir()
    with pytest.raises(GlimpseError, match="is a folder"):
        open_torch(path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(GlimpseError, match="not a regular file"):
        open_torch(tmp_path / "pipe.pt")


def test_names_of_strangers_are_shown_harmlessly(tmp_path):
    path = write(tmp_path / "x.pt", item("\x1b]0;x\x07", b"N"))
    with pytest.raises(GlimpseError, match="is a NoneType") as error:
        open_torch(path)
    assert str(error.value).isprintable()


def test_changed_bytes_and_opcodes(tmp_path):
    """Random changes of a small file: it is read, or refused in one line."""
    torch.save(OrderedDict(a=torch.arange(6.0).reshape(2, 3).T, b={"c": torch.nn.Parameter(torch.zeros(3))}), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as opened:
        parts = {info.filename: opened.read(info) for info in opened.infolist()}
    pickle = parts["x/data.pkl"]
    starts = [place for _, _, place in pickletools.genops(pickle)] + [len(pickle)]
    chunks = [pickle[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    random, read = np.random.default_rng(0), 0
    for _ in range(600):
        changed = list(chunks)
        for _ in range(random.integers(1, 4)):
            place, kind = int(random.integers(len(changed))), int(random.integers(4))
            if kind == 0:
                del changed[place]
            elif kind == 1:
                changed.insert(place, chunks[int(random.integers(len(chunks)))])
            elif kind == 2:
                changed[place] = random.bytes(int(random.integers(1, 6)))
            else:
                changed[place] = bytes([chunks[place % len(chunks)][0]]) + random.bytes(len(changed[place]) - 1)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name, data in (parts | {"x/data.pkl": b"".join(changed)}).items():
                file.writestr(name, data)
        (tmp_path / "y.pt").write_bytes(buffer.getvalue())
        try:
            read += bool(read_torch(tmp_path / "y.pt"))
        except GlimpseError as error:
            assert "\n" not in str(error)
    assert 0 < read < 600
