"""Eight fake devices: the sharded model gives the unsharded model's results, and parameters lie where the table says."""

import dataclasses
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_models as tiny
from jax.sharding import PartitionSpec

from gp_jax import GlimpseError, GlimpseVLM, Ladder, Look, Prune, make_mesh
from gp_jax.models.vision import spread_windows
from gp_jax.sharding import _warn_once, parameter_sharding

SAMPLES = [[5, (4, 6), 7], [2, (3, 3), 1, (2, 5), 9], [12], [1, (2, 2), 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny.hf_model()
    model.save_pretrained(folder)
    tiny.save_glimpse(folder / "glimpse", model, tiny.GLIMPSE, tiny.glimpse_weights(tiny.GLIMPSE))
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return GlimpseVLM.from_pretrained(folder, glimpse=folder / "glimpse", ladders=tiny.LADDERS)


# With the rows that samples are padded to: 3 do not divide over data x fsdp and lie whole on every device.
MESHES = [((2, 4, 1), 8), ((2, 2, 2), 4), ((2, 2, 2), 3), ((1, 1, 8), 4)]


@pytest.mark.parametrize(("shape", "rows"), MESHES, ids=str)
def test_sharded_equals_unsharded(folder, plain, shape, rows):
    ladders = dataclasses.replace(tiny.LADDERS, batch=Ladder("batch", (rows,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # replicated heads are announced; tested below
        mesh = make_mesh(*shape)
        sharded = GlimpseVLM.from_pretrained(folder, glimpse=folder / "glimpse", ladders=ladders, mesh=mesh)
    look = Look(least=4, threshold=1.0, floor=0.4, cap=0.5, sure=None)  # of two of the samples, whose first looks are a batch of their own
    for prune in (
        (Prune(max_remain_ratio=0.3), Prune(look=look), None) if (shape, rows) == ((2, 2, 2), 4) else (Prune(max_remain_ratio=0.3),)
    ):
        inputs = tiny.inputs(SAMPLES[:rows])
        a, b = (vlm.generate(**inputs, prune=prune, max_new_tokens=5, eos_token_id=None) for vlm in (plain, sharded))
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.first_logits, b.first_logits, atol=1e-4)
        for x, y in zip((*a.keep, *a.viewed), (*b.keep, *b.viewed), strict=True):
            np.testing.assert_array_equal(x, y)
    weight = sharded.model.decoder.layers[0].mlp.gate_proj.weight[...]
    assert weight.sharding.spec == PartitionSpec("tensor", "fsdp")
    assert weight.addressable_shards[0].data.shape == (48 // shape[2], 32 // shape[1])
    held = sharded.engine.split(np.zeros((rows, 2)), rows).addressable_shards[0].data.shape[0]
    assert held == (3 if rows == 3 else rows // (shape[0] * shape[1]))


def test_heads_that_do_not_divide_are_replicated_with_one_warning(folder):
    text = GlimpseVLM.from_pretrained(folder).config.text
    mesh = make_mesh(1, 2, 4)
    _warn_once.cache_clear()  # another test of this process may have been warned
    with pytest.warns(UserWarning, match="2 key-value heads do not divide over tensor=4"):
        key = parameter_sharding("decoder.layers.0.self_attn.k_proj.weight", (16, 32), mesh, text)
    assert key.spec == PartitionSpec(None, "fsdp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter_sharding("decoder.layers.1.self_attn.v_proj.weight", (16, 32), mesh, text)
    query = parameter_sharding("decoder.layers.0.self_attn.q_proj.weight", (32, 32), mesh, text)
    assert query.spec == PartitionSpec("tensor", "fsdp")


def test_windows_lie_on_all_chips_of_a_sample_where_they_divide():
    """Otherwise every chip of the axis `tensor` would compute all queries, keys and values of a vision block."""
    mesh, x = make_mesh(2, 1, 4), np.arange(2 * 24 * 3, dtype=np.float32).reshape(2, 24, 3)
    with jax.set_mesh(mesh):
        spread, odd = jax.jit(lambda x: (spread_windows(x, 3), spread_windows(x, 4)))(x)
    np.testing.assert_array_equal(spread, x)
    assert {shard.data.shape for shard in spread.addressable_shards} == {(1, 6, 3)}, "8 windows on 4 chips"
    assert {shard.data.shape for shard in odd.addressable_shards} == {(1, 24, 3)}, "6 windows do not divide over 4"


def test_mesh_must_use_all_devices():
    with pytest.raises(GlimpseError, match="needs 4 devices, there are 8"):
        make_mesh(2, 2, 1)
    assert make_mesh(2, 2, 1, devices=jax.devices()[:4]).size == 4
    with pytest.raises(GlimpseError, match="of 2 TPU slices"):
        make_mesh(2, 1, 1, devices=[SimpleNamespace(slice_index=0), SimpleNamespace(slice_index=1)])
