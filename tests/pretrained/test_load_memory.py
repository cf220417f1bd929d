"""Parameters go straight to their shards: every part of a tensor is read once, and the host holds one tensor beside the shards."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from xla_flags import flags

from gp_jax import make_mesh
from gp_jax.pretrained import files, params
from gp_jax.pretrained.hf_config import model_config
from gp_jax.pretrained.names import checkpoint_name, names_of
from gp_jax.sharding import parameter_sharding
from gp_jax.tiny import CONFIG

MIB = 2**20
MESHES = ((1, 1, 8), (4, 1, 2), (1, 8, 1))
# Nearly all of it lies in the embedding and the head, 32 MiB each.
LARGE = CONFIG | {
    "vocab_size": 32768,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vision_config": CONFIG["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 256},
}
SLACK = 12 * MIB  # python's own and what the allocator keeps


def load(folder: Path, shape: tuple[int, int, int], source: files.TensorSource | None = None) -> nnx.Module:
    source, mesh = source or files.base_source(folder), make_mesh(*shape)
    return params.load(model_config(LARGE, {}), None, source, None, dtype=None, mesh=mesh)


class Counted:
    """A source that counts the bytes read of every tensor."""

    def __init__(self, source: files.TensorSource):
        self.source, self.where, self.shapes, self.dtype, self.bytes = source, source.where, source.shapes, source.dtype, Counter()

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self.source.read(key, index)
        self.bytes[key] += part.nbytes
        return part


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, config, rng = tmp_path_factory.mktemp("large"), model_config(LARGE, {}), np.random.default_rng(0)
    state, tensors = nnx.state(params.abstract_model(config, None, jnp.float32)), {}
    for path, value in nnx.to_flat_state(state):
        path = ".".join(map(str, path))
        shape = params.checkpoint_shape(path, value.shape, config)
        tensors[checkpoint_name(path, names_of(config).rules)] = rng.random(shape, np.float32)
    files.write_tensors(folder / files.SINGLE, tensors)
    return folder


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_part_is_read_once(folder, shape):
    source = Counted(files.base_source(folder))
    model, stored = load(folder, shape, source), files.base_source(folder)
    sizes = {key: 4 * int(np.prod(shape)) for key, shape in source.shapes.items()}
    fixed = {key for key in sizes if "patch_embed" in key}  # whole for each part: in the file it is a convolution
    assert {key: size for key, size in source.bytes.items() if key not in fixed} == {k: s for k, s in sizes.items() if k not in fixed}
    embedding = model.decoder.embed_tokens[...]
    assert embedding.sharding == parameter_sharding("decoder.embed_tokens", embedding.shape, make_mesh(*shape), model.config.text)
    np.testing.assert_array_equal(np.asarray(embedding), stored.read("model.embed_tokens.weight", ()))


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def child(folder: str, shape: list[int]) -> None:
    """Prints how far this process's memory rose while loading, and the shards' bytes."""
    jax.block_until_ready([jax.device_put(np.zeros(8), device) for device in jax.devices()])  # what the devices themselves need
    before = status("VmRSS")
    model = load(Path(folder), tuple(shape))
    arrays = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    shards = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    print(json.dumps({"rose": status("VmHWM") - before, "shards": shards, "largest": max(array.nbytes for array in arrays)}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process had at most")
@pytest.mark.parametrize("shape", MESHES[:2], ids=str)
def test_the_host_holds_few_tensors_beside_the_shards(folder, shape):
    """In a process of its own, on devices whose memory is the host's."""
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}; from test_load_memory import child; "
    )
    code += f"child({str(folder)!r}, {list(shape)})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": flags(8)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shards"] >= found["largest"] * shape[0] and found["largest"] == 32 * MIB
    # On a busy machine a device may still be copying one tensor while the next one is read.
    assert found["rose"] <= found["shards"] + 2 * found["largest"] + SLACK, {name: size / MIB for name, size in found.items()}
