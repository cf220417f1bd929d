"""The released glimpse file without torch: what torch writes is read, what torch reads is written, anything else is refused."""

import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gp_jax import GlimpseError
from gp_jax.pretrained.torch_file import read_torch, write_torch

pytestmark = pytest.mark.quick


def test_torch_file_round_trip(tmp_path):
    content = {
        "a": {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.zeros((0, 4), np.float32)},
        "b": np.float32(3.0).reshape(()),
        "c": np.arange(3, dtype=jnp.bfloat16),
        "d": {"e": {"f": np.array([True, False])}},
    }
    write_torch(tmp_path / "x.pt", content)
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(theirs["a"]["x"], torch.arange(6.0).reshape(2, 3)) and theirs["a"]["y"].shape == (0, 4)
    assert theirs["b"].item() == 3 and theirs["c"].dtype == torch.bfloat16 and theirs["d"]["e"]["f"].tolist() == [True, False]
    ours = read_torch(tmp_path / "x.pt")
    assert set(ours) == {"a.x", "a.y", "b", "c", "d.e.f"}
    np.testing.assert_array_equal(ours["a.x"], content["a"]["x"])
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}, "the same weights are the same file"


def test_reads_views_and_parameters_of_torch(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    torch.save({"t": base.T, "slice": base[1:3, ::2], "half": base.half(), "p": torch.nn.Parameter(base)}, tmp_path / "x.pt")
    ours = read_torch(tmp_path / "x.pt")
    np.testing.assert_array_equal(ours["t"], base.T)
    np.testing.assert_array_equal(ours["slice"], base[1:3, ::2])
    np.testing.assert_array_equal(ours["p"], base)
    assert ours["half"].dtype == np.float16


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def torch_zip(path, payload: bytes, compression=zipfile.ZIP_STORED, **entries: bytes):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", payload)
        for name, data in entries.items():
            archive.writestr(f"x/data/{name.removeprefix('s')}", data)


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path):
    victim, path = tmp_path / "written", tmp_path / "evil.pt"
    torch_zip(path, pickle.dumps({"a": Evil(str(victim))}, protocol=2))
    with pytest.raises(GlimpseError, match=r"evil.pt: .*'(io|_io|__builtin__|builtins)\.open'"):
        read_torch(path)
    torch.save({"a": torch.zeros(2), "b": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(GlimpseError, match=r"'torch\.nn\.modules\.linear\.Linear'"):
        read_torch(path)
    assert not victim.exists()


def tensor_pickle(size: tuple, stride: tuple, offset: int = 0, count: int = 4) -> bytes:
    """A storage of `count` floats and a view of it, as torch.save writes them."""
    numbers = lambda values: b"(" + b"".join(b"K" + bytes([v]) for v in values) + b"t"  # noqa: E731
    storage = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK" + bytes([count]) + b"tQ"
    view = storage + b"K" + bytes([offset]) + numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n" + view + b"s."


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch_zip(path, tensor_pickle((2, 2), (2, 1)), s0=np.arange(4, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(read_torch(path)["a"], [[0, 1], [2, 3]])
    for size, stride, offset in (((3, 2), (2, 1), 0), ((2, 2), (2, 1), 1), ((2,), (200,), 0), ((2,), (1, 1), 0), ((200,), (0,), 0)):
        torch_zip(path, tensor_pickle(size, stride, offset), s0=np.arange(4, dtype=np.float32).tobytes())
        with pytest.raises(GlimpseError, match="reaches beyond|impossible"):
            read_torch(path)
    torch_zip(path, tensor_pickle((2, 2), (2, 1)), s0=b"\0" * 8)
    with pytest.raises(GlimpseError, match="8 bytes, 16 expected"):
        read_torch(path)


def test_a_tensor_is_no_storage(tmp_path):
    """A view of a view would be checked against the wrong size."""
    inner = tensor_pickle((2, 2), (2, 1))[len(b"\x80\x02}X\x01\x00\x00\x00a") : -2]
    payload = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + inner + b"K\x01(K\x02t(K\x01t\x89}tRs."
    torch_zip(tmp_path / "x.pt", payload, s0=b"\0" * 16)
    with pytest.raises(GlimpseError, match="not a view of a storage"):
        read_torch(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x80\x02.", b"garbage", pickle.dumps({"a": 3}), pickle.dumps([1, 2]), pickle.dumps({"a": {"b": "text"}}), b"\x80\x02}Q."],
    ids=["empty", "stop", "garbage", "number", "list", "string", "reference"],
)
def test_other_pickles_are_one_clear_line(tmp_path, payload):
    torch_zip(tmp_path / "x.pt", payload)
    with pytest.raises(GlimpseError, match=r"x.pt: cannot be read as tensors: .+") as error:
        read_torch(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_not_a_torch_file(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"hello")
    with pytest.raises(GlimpseError, match="x.pt: cannot be read"):
        read_torch(path)
    torch_zip(path, pickle.dumps({}), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(GlimpseError, match="compressed"):
        read_torch(path)
