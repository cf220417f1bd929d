"""One program with every bucket inside gives the tokens of `generate`: any plan, any mix of samples, any rung, any mesh."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from jax.sharding import NamedSharding, PartitionSpec

from gp_jax import GlimpseError, GlimpseVLM, Ladder, Ladders, Prune, inference_buckets, inference_fn, inference_params, make_mesh
from gp_jax.inference.function import INPUTS, OUTPUTS
from gp_jax.ops.attention import attend
from gp_jax.ops.layers import product
from gp_jax.ops.target import targeting
from gp_jax.sharding import parameter_sharding

SAMPLES = [[5, (4, 6), 7], [2, (3, 3), 1, (2, 5), 9], [12], [1, (2, 2), 3]]
NEW = 8


def ladders(**rungs: tuple[int, ...]) -> Ladders:
    return Ladders(**{name: Ladder(name, values) for name, values in rungs.items()})


BUCKETS = ladders(patches=(256,), prompt=(64,), kept=(32,), batch=(5,))
MANY = ladders(patches=(128, 256), prompt=(64,), kept=(16, 32), batch=(5,))  # every rung costs compilation


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny.hf_model(layers=4)
    glimpse = tiny.GLIMPSE | {"le_length": 2, "selected_layers": [0, 1]}
    model.save_pretrained(folder)
    tiny.save_glimpse(folder / "glimpse", model, glimpse, tiny.glimpse_weights(glimpse))
    return GlimpseVLM.from_pretrained(folder, glimpse=folder / "glimpse", ladders=tiny.LADDERS)


def function(vlm, prune, buckets=BUCKETS, new=NEW, **options):
    return inference_fn(vlm.config, prune, buckets, new, glimpse=vlm.glimpse_config, **options)


def same(vlm, infer, params, samples, prune, buckets=BUCKETS, seed=3, **options):
    """Asks the function and `generate` and compares everything that both return. Returns: the function's outputs."""
    batch = tiny.inputs(samples, seed=seed)
    made = vlm.inference_inputs(inputs=batch, prune=prune, buckets=buckets)
    assert all(re.sub("^cut[0-9]+", "cut*", name) in INPUTS for name in made)
    out = {name: np.asarray(x) for name, x in infer(params, made).items()}
    done = vlm.generate(**batch, prune=prune, max_new_tokens=out["tokens"].shape[1], **options)
    steps = done.tokens.shape[1]
    assert set(out) == set(OUTPUTS)
    np.testing.assert_array_equal(out["tokens"][: len(samples), :steps], done.tokens)
    assert (out["tokens"][: len(samples), steps:] == vlm.config.pad_token_id).all()
    assert (out["tokens"][len(samples) :] == vlm.config.pad_token_id).all() and not out["lengths"][len(samples) :].any()
    np.testing.assert_allclose(out["first_logits"][: len(samples)], done.first_logits, atol=2e-5)
    for b, keep in enumerate(done.keep):
        np.testing.assert_array_equal(out["keep"][b], np.pad(keep, (0, out["keep"].shape[1] - keep.size)))
        assert (out["kept"][b], out["visual_tokens"][b]) == (keep.sum(), keep.size)
        if done.mask_logits is not None:
            np.testing.assert_allclose(out["importance"][b, : keep.size], 1 / (1 + np.exp(-done.mask_logits[b])), atol=1e-5)
    return out


def test_glimpse_in_every_bucket(vlm):
    """Mixed pictures, a text-only sample, a row that only fills the batch; short requests take the smallest rungs. The numbers of the
    keep rule come with the inputs."""
    infer, params = jax.jit(function(vlm, Prune(), MANY, eos_token_id=None)), inference_params(vlm.model)
    kept = []
    for prune in (Prune(), Prune(max_remain_ratio=0.2), Prune(reduce_threshold=1.0, min_remain_num=0)):
        for samples in (SAMPLES, SAMPLES[-1:], [[9]]):
            out = same(vlm, infer, params, samples, prune, MANY, eos_token_id=None)
            kept += [out["kept"].sum()] if samples is SAMPLES else []
    assert kept[0] > kept[1] > kept[2] == 0


@pytest.mark.parametrize(
    "prune",
    [
        None,
        Prune(method="fastv", fixed_remain_ratio=0.3),
        Prune(method="visionzip", fixed_remain_ratio=0.5),
        Prune(method="random", fixed_remain_ratio=0.4, seed=2),
    ],
    ids=["dense", "fastv", "visionzip", "random"],
)
def test_other_plans(vlm, prune):
    infer = jax.jit(function(vlm, prune, eos_token_id=None))
    same(vlm, infer, inference_params(vlm.model), SAMPLES, prune, eos_token_id=None)


def test_the_end_token_ends_a_sample(vlm):
    free = vlm.generate(**tiny.inputs(SAMPLES, seed=3), prune=None, max_new_tokens=NEW, eos_token_id=None).tokens
    stop = int(free[0, 3])
    out = same(vlm, jax.jit(function(vlm, None, eos_token_id=stop)), inference_params(vlm.model), SAMPLES, None, eos_token_id=stop)
    ends = [int(hits[0]) + 1 if (hits := np.flatnonzero(row == stop)).size else NEW for row in free]
    assert out["lengths"][:4].tolist() == ends


def test_sharded_equals_unsharded(vlm):
    mesh, prune = make_mesh(2, 2, 2), Prune(max_remain_ratio=0.3)
    buckets = ladders(patches=(256,), prompt=(64,), kept=(32,), batch=(4,))
    params = inference_params(vlm.model)

    def place(path, x):
        return jax.device_put(x, parameter_sharding(jax.tree_util.keystr(path, simple=True, separator="."), x.shape, mesh, vlm.config.text))

    sharded = jax.tree_util.tree_map_with_path(place, params)
    assert len(sharded["decoder"]["layers"]["0"]["mlp"]["gate_proj"]["weight"].sharding.device_set) == 8
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    infer = jax.jit(function(vlm, prune, buckets, eos_token_id=None), in_shardings=(None, split))
    same(vlm, infer, sharded, SAMPLES, prune, buckets, eos_token_id=None)


def test_attention_is_chosen_when_it_is_lowered():
    """Long rows: three platforms in one export, the TPU's kernel among them; here the CPU's runs."""
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(1, heads, 256, 16)).astype(np.float32) for heads in (2, 1, 1))
    segment = np.where(np.arange(256) < 200, 0, -1)[None].astype(np.int32)

    def long(q, k, v, segment):
        with targeting("cpu", "tpu", "cuda"):
            return attend(q, k, v, segment, segment, causal=True)

    expected = attend(q, k, v, segment, segment, causal=True, implementation="einsum")
    np.testing.assert_allclose(jax.jit(long)(q, k, v, segment), expected, atol=2e-6)
    np.testing.assert_allclose(long(q, k, v, segment), expected, atol=2e-6)
    exported = jax.export.export(jax.jit(long), platforms=("cpu", "tpu", "cuda"))(q, k, v, segment)
    assert exported.mlir_module().count("tpu_custom_call") == 1
    np.testing.assert_allclose(jax.jit(exported.call)(q, k, v, segment), expected, atol=2e-6)


def test_default_buckets_hold_what_they_promise(vlm):
    """Any one picture of so many visual tokens fits, whatever its shape."""
    from gp_jax.processing.windows import pack_windows

    for side in (1, 2, 3, 4, 5, 8):
        config = replace(vlm.config, vision=replace(vlm.config.vision, window_size=28 * side))
        for capacity in (1, 4, 21, 60, 64, 100):
            patches = inference_buckets(config, visual_tokens=(capacity,)).patches.rungs[-1]
            for rows in range(1, capacity + 1):
                slots, _ = pack_windows([(rows, capacity // rows)], side)
                assert slots.size * 4 <= patches


def test_errors_name_what_is_wrong(vlm):
    params = inference_params(vlm.model)
    for make, message in (
        (lambda: function(vlm, None, new=0), "max_new_tokens=0"),
        (lambda: function(vlm, None, attention="cudnn"), "attention='cudnn' is not one of auto, xla"),
        (lambda: inference_fn(vlm.config, Prune(), BUCKETS, NEW), "no glimpse is loaded"),
        (lambda: inference_buckets(vlm.config, visual_tokens=(0,)), r"visual_tokens\[0\]=0"),
        (lambda: inference_buckets(vlm.config, batch=0), "batch=0"),
        (lambda: vlm.inference_inputs(inputs=tiny.inputs([[99]]), buckets=BUCKETS), "'prompt' ladder, which ends at 64"),
        (lambda: vlm.inference_inputs(inputs=tiny.inputs([[1]] * 6), buckets=BUCKETS), "'batch' ladder, which ends at 5"),
        (lambda: vlm.inference_inputs(inputs=tiny.inputs([[1, (20, 20), 1]]), buckets=tiny.LADDERS), "'p[a-z]*' ladder"),
        (lambda: function(vlm, None)(params, {}), "inputs: glimpse_row has the shape None, this program takes \\(5, 64\\)"),
    ):
        with pytest.raises(GlimpseError, match=message):
            make()
    batch = vlm.inference_inputs(inputs=tiny.inputs([[5]]), prune=None, buckets=BUCKETS)
    with pytest.raises(GlimpseError, match="params: decoder.embed_tokens is missing"):
        function(vlm, None)({"decoder": {}}, batch)


def test_ladders_whose_rungs_are_less_than_a_window_or_come_to_the_same(vlm):
    """The engine's default ladders are of this kind: fine at their lower end, where a tile of CLIP does not fit."""
    fine = ladders(patches=(8, 96, 100, 256), prompt=(64,), kept=(32,), batch=(5,))
    infer = jax.jit(function(vlm, None, fine, new=2, eos_token_id=None))
    same(vlm, infer, inference_params(vlm.model), SAMPLES, None, fine, eos_token_id=None)
    with pytest.raises(GlimpseError, match="8 patches are less than an attention window of this model, .*raise Ladders.patches"):
        function(vlm, None, ladders(patches=(8,), prompt=(64,), kept=(32,), batch=(5,)))


def test_a_lone_row_is_doubled_for_a_cpu_alone():
    """In bfloat16: CPU's matrix times vector is slow; a TPU's program must not compute, nor count, the other row."""
    row, weight = jnp.ones((1, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    shapes = {}
    for platforms in (("cpu",), ("cpu", "tpu", "cuda"), ("xla",), ("tpu",), ("cuda",)):
        with targeting(*platforms):
            shapes[platforms] = "[2,8]" in str(jax.make_jaxpr(lambda x: product(x, weight))(row))
    assert shapes == {("cpu",): True, ("cpu", "tpu", "cuda"): True, ("xla",): True, ("tpu",): False, ("cuda",): False}
