"""Layers as programs of their own: the results of one unrolled program, and one compilation for all equal layers."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from gp_jax import GlimpseError, GlimpseVLM, pipeline
from gp_jax.inference.shared_programs import Parts, Programs
from gp_jax.processing.layout import read_samples, vision_input
from gp_jax.pruning.scorers.scorer import Cut
from gp_jax.runtime.clock import COMPILES

SAMPLES = [[5, (4, 6), 7], [2, (3, 3), 1, (2, 5), 9]]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny.hf_model()
    model.save_pretrained(folder)
    tiny.save_glimpse(folder / "glimpse", model, tiny.GLIMPSE, tiny.glimpse_weights(tiny.GLIMPSE))
    return GlimpseVLM.from_pretrained(folder, glimpse=folder / "glimpse", ladders=tiny.LADDERS)


def same(a, b):
    """To 1e-6 of the largest value."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1.0, float(jnp.max(jnp.abs(y.astype(jnp.float32))))))


def test_layer_by_layer_equals_one_program(vlm):
    engine, samples = vlm.engine, read_samples(vlm.config, **tiny.inputs(SAMPLES))
    cut = Cut(vlm.glimpse_config.reduce_layer, "glimpse")
    vision = engine.split(vision_input(samples, vlm.config, 2, engine.vision_slots(samples)), 2)
    prompt, look = engine.prompt(samples, 2, 64, engine.glimpse_rows), engine.look((cut,))
    graph, state = nnx.split(vlm.model)

    @jax.jit
    def unrolled(state, vision, prompt):
        model = nnx.merge(graph, state)
        features = pipeline.see(model, vision)
        return features, pipeline.run(model, pipeline.embed(model, prompt, features), 0, cut.after + 1, **look)

    features = engine.see(vision)
    stream = engine.run(engine.embed(prompt, features), low=0, high=cut.after + 1, **look)
    same((features, stream), unrolled(state, vision, prompt))
    assert sorted(stream.taps) == sorted(vlm.glimpse_config.selected_layers)
    assert len(stream.kv) == cut.after + 1 and len({id(kv.valid) for kv in stream.kv}) == 1, "one mask for all layers"


def test_equal_layers_share_a_program(vlm):
    parts, calls = Parts(programs=Programs()), []
    x = jnp.ones((1, 8, vlm.config.text.hidden_size))

    def mlp(layer, x):
        calls.append(layer)
        return layer.mlp(x)

    outs = [parts(mlp, layer, x) for layer in vlm.model.decoder.layers]
    assert len(calls) == 1 and len(parts.programs.kinds) == 1, "traced once"
    assert len({float(out.sum()) for out in outs}) == len(outs), "with weights of their own"
    parts(mlp, vlm.model.decoder.layers[0], x[:, :4])
    assert len(calls) == 2, "and once per shape"
    assert float(parts(lambda x: x.sum(), x)) == x.size


def test_models_of_equal_structure_share_their_programs(vlm, tmp_path):
    """Another glimpse, other weights: another model, the same programs."""
    model = tiny.hf_model(seed=1)
    model.save_pretrained(tmp_path)
    tiny.save_glimpse(tmp_path / "glimpse", model, tiny.GLIMPSE, tiny.glimpse_weights(tiny.GLIMPSE))
    other = GlimpseVLM.from_pretrained(tmp_path, glimpse=tmp_path / "glimpse", ladders=tiny.LADDERS)
    inputs = tiny.inputs(SAMPLES)
    first, before = vlm.generate(**inputs, max_new_tokens=4), COMPILES.count
    second = other.generate(**inputs, max_new_tokens=4)
    assert COMPILES.count == before
    assert not np.array_equal(first.mask_logits[0], second.mask_logits[0])


def test_donated_arguments_are_used_up():
    parts, x = Parts(programs=Programs()), jnp.ones(4)
    parts(lambda x: x + 1, x, donate=(0,))
    assert x.is_deleted()


def copied(module: nnx.Module) -> nnx.Module:
    """With arrays of its own."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def test_weights_changed_in_place_are_used(vlm):
    """By an engine that ran before, without compiling anything, whichever way they were changed."""
    inputs, vlm = tiny.inputs(SAMPLES), vlm.with_model(copied(vlm.model))
    layer, predictor = vlm.model.decoder.layers[1], vlm.model.predictor

    def answer() -> tuple[np.ndarray, np.ndarray]:
        done = vlm.generate(**inputs, max_new_tokens=1)
        return done.first_logits.copy(), np.concatenate(done.mask_logits)

    def moved(by: str) -> None:
        nonlocal before
        compiled, now = COMPILES.count, answer()
        assert not np.array_equal(now[0], before[0]), f"{by}: the logits are those of the old weights"
        assert COMPILES.count == compiled, f"{by}: the programs are the same"
        before = now

    before = answer()
    layer.mlp.up_proj.weight[...] = layer.mlp.up_proj.weight[...] * 1.5
    moved("a value")
    old = before
    predictor.attn_in_proj.weight[...] = -predictor.attn_in_proj.weight[...]
    before = answer()
    assert not np.array_equal(before[1], old[1])
    before = answer()
    layer.mlp.up_proj.weight = nnx.Param(layer.mlp.up_proj.weight[...] / 1.5)
    moved("a variable")
    vlm.model.decoder.layers[1].self_attn = copied(vlm.model.decoder.layers[0].self_attn)
    moved("a module")
    vlm.model.decoder.norm.weight[...] = vlm.model.decoder.norm.weight[...] * 2
    moved("a part of the whole")
    nnx.update(vlm.model, jax.tree.map(lambda x: x * 1.01, nnx.state(vlm.model)))
    moved("all at once")
    for owner, name, value in ((vlm.model.decoder.norm, "eps", 5.0), (layer.mlp, "act", jnp.tanh)):  # settings: another program
        setattr(owner, name, value)
        now = answer()
        assert not np.array_equal(now[0], before[0]), f"{name}: the logits are those of the old setting"
        before = now


def test_old_weights_are_let_go(vlm):
    """At once, not at the next request: there is no room for two models."""
    parts, layer = Parts(programs=Programs()), copied(vlm.model.decoder.layers[0])
    parts(lambda layer, x: layer.mlp(x), layer, jnp.ones((1, 8, vlm.config.text.hidden_size)))
    old = weakref.ref(layer.mlp.up_proj.weight.get_raw_value())
    layer.mlp.up_proj.weight[...] = layer.mlp.up_proj.weight[...] * 2
    gc.collect()
    assert old() is None
    kept = weakref.ref(layer.mlp.up_proj.weight.get_raw_value())
    del layer
    gc.collect()
    assert kept() is None and not parts.known, "with the module"


def test_weights_that_give_no_numbers_are_an_error(vlm):
    """Not token 0: of the decoder, for which sample it is said, and of the predictor."""
    inputs, broken = tiny.inputs(SAMPLES), vlm.with_model(copied(vlm.model))
    table = broken.model.decoder.embed_tokens
    seen = inputs["input_ids"][1, -1]  # of the second sample only
    assert seen not in inputs["input_ids"][0]
    table[...] = table[...].at[seen].set(jnp.nan)
    with pytest.raises(GlimpseError, match="sample 2 of 2: the model's logits for the first new token are not finite"):
        broken.generate(**inputs, max_new_tokens=1)
    broken = vlm.with_model(copied(vlm.model))
    broken.model.predictor.attn_in_proj.weight[...] *= jnp.inf
    with pytest.raises(GlimpseError, match="sample 1 of 2: the importance of its visual tokens is not a number"):
        broken.generate(**inputs, max_new_tokens=1)
