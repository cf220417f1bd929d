"""What must not change a result: compaction, batching, buckets, streaming."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from gp_jax import GlimpseError, GlimpseVLM, Ladder, Ladders, Prune, pipeline
from gp_jax.inference.engine import Engine
from gp_jax.inference.requests import resolve
from gp_jax.processing.layout import read_samples
from gp_jax.pruning.scorers.scorer import Cut
from gp_jax.trees import LayerKV, Stream

SAMPLES = [[5, (4, 6), 7], [2, (3, 3), 1, (2, 5), 9], [12], [1, (2, 2), 3]]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny.hf_model(layers=4)
    glimpse = tiny.GLIMPSE | {"le_length": 2, "selected_layers": [0, 1]}
    model.save_pretrained(folder)
    tiny.save_glimpse(folder / "glimpse", model, glimpse, tiny.glimpse_weights(glimpse))
    return GlimpseVLM.from_pretrained(folder, glimpse=folder / "glimpse", ladders=tiny.LADDERS)


def with_ladders(vlm: GlimpseVLM, **rungs: tuple[int, ...]) -> GlimpseVLM:
    """The same model behind other buckets."""
    ladders = {name: getattr(tiny.LADDERS, name) for name in ("patches", "prompt", "kept", "decode", "batch")}
    ladders |= {name: Ladder(name, values) for name, values in rungs.items()}
    return GlimpseVLM(vlm.model, vlm.hf_config, vlm.processor, ladders=Ladders(**ladders))


def masked_in_place(model, stream: Stream, stays, cut: Cut) -> jax.Array:
    """The layers behind a cut on the full-length stream, dropped rows hidden instead of removed. Returns: first logits.

    Attention is written out: a dropped row is no key for anybody.
    """
    hidden, angles = stream.hidden, model.decoder.angles(stream.positions)
    causal = jnp.tril(jnp.ones((hidden.shape[1],) * 2, bool))[None, None]
    for layer in model.decoder.layers[cut.after + 1 :]:
        q, k, v = layer.self_attn.project(layer.input_layernorm(hidden), angles)
        groups = q.shape[1] // k.shape[1]
        k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
        scores = jnp.einsum("bnth,bnsh->bnts", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(causal & stays[:, None, None], scores, -1e30)
        hidden = layer.finish(hidden, jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores, -1), v))
    last = hidden.shape[1] - 1 - jnp.argmax(stays[:, ::-1], axis=1)
    return model.decoder.logits(hidden[jnp.arange(hidden.shape[0]), last])


RULES = {
    "mixed": Prune(),
    "all": Prune(reduce_threshold=0.0),
    "floor": Prune(reduce_threshold=1.0, min_remain_num=1),
    "nothing": Prune(reduce_threshold=1.0, min_remain_num=0),
    "cap": Prune(max_remain_ratio=0.2),
}


@pytest.mark.quick
@pytest.mark.parametrize("rule", RULES)
def test_compacted_equals_masked_in_place(vlm, rule):
    engine, model = vlm.engine, vlm.model
    samples = read_samples(vlm.config, **tiny.inputs(SAMPLES))
    pruning = resolve(RULES[rule], vlm.glimpse_config, vlm.config.text.num_hidden_layers)
    cut, (given,) = pruning.plan[0], engine.batch(samples, pruning).cuts
    prompt = engine.prompt(samples, 4, 64, engine.glimpse_rows)
    from gp_jax.processing.layout import vision_input

    vision = engine.split(vision_input(samples, vlm.config, 4, engine.vision_slots(samples)), 4)
    features = engine.see(vision)
    stream = engine.run(engine.embed(prompt, features), low=0, high=cut.after + 1, **engine.look((cut,)))
    _, keep, stays, need = engine.score(stream, vision, features, cut=cut, limits=given.limits, given=None)
    counts = [int(k) for k in stays.sum(axis=1)]
    assert int(need) == max(counts)
    expected = masked_in_place(model, stream, stays, cut)
    for length in (int(need), int(need) + 3, 64):  # exactly the bucket's edge, some room, everything
        short = engine.compact(stream, stays, cut=cut, length=length)
        assert short.hidden.shape[1] == length and [int(v) for v in short.valid.sum(axis=1)] == counts
        for kv in short.kv:
            assert kv.key.shape[2] == length, "the cache of the layers already run is cut too"
        logits = engine.head(engine.run(short, low=cut.after + 1, high=4))
        np.testing.assert_allclose(logits, expected, atol=2e-5)
    if rule == "all":
        assert counts == [sample.ids.size for sample in samples]
    if rule == "nothing":
        assert counts == [sample.ids.size - sample.count for sample in samples]
    if rule == "floor":
        assert counts == [sample.ids.size - sample.count + min(1, sample.count) for sample in samples]


@pytest.mark.quick
def test_a_cut_can_leave_the_past_alone():
    """`past=False`: earlier layers keep every row in their cache, later ones see the short stream (FastV's kind of cut)."""
    rows = jnp.arange(6.0)[None, :, None]
    kv = LayerKV(rows[:, None], rows[:, None], jnp.ones((1, 6), bool))
    index = jnp.full((1, 6), -1)
    stream = Stream(rows, jnp.arange(6)[None, None], jnp.ones((1, 6), bool), index, index, jnp.array([5]), (kv,), {})
    stays = jnp.array([[True, False, True, True, False, True]])
    kept = pipeline.compact(stream, stays, Cut(0, "given", past=False), 4)
    assert kept.hidden[0, :, 0].tolist() == [0, 2, 3, 5] and kept.positions[0, 0].tolist() == [0, 2, 3, 5]
    assert kept.kv[0].key.shape[2] == 6
    assert pipeline.compact(stream, stays, Cut(0, "given"), 4).kv[0].key[0, 0, :, 0].tolist() == [0, 2, 3, 5]


CAP = Prune(max_remain_ratio=0.3)


def generate(vlm, samples, prune=CAP, **options):
    return vlm.generate(**tiny.inputs(samples, seed=3), prune=prune, **dict(max_new_tokens=10, eos_token_id=None) | options)


@pytest.mark.quick
@pytest.mark.parametrize("prune", [None, Prune(max_remain_ratio=0.3), Prune(fixed_remain_ratio=0.5)], ids=["dense", "cap", "fixed"])
def test_batched_equals_one_by_one(vlm, prune):
    together = generate(vlm, SAMPLES, prune)
    whole, patch, image = tiny.inputs(SAMPLES, seed=3), 0, 0
    for b, sample in enumerate(SAMPLES):
        grids = [s for s in sample if not isinstance(s, int)]
        patches = 4 * sum(r * c for r, c in grids)
        mask = whole["attention_mask"][b].astype(bool)
        alone = vlm.generate(
            input_ids=whole["input_ids"][b : b + 1, mask],
            pixel_values=whole["pixel_values"][patch : patch + patches] if grids else None,
            image_grid_thw=whole["image_grid_thw"][image : image + len(grids)] if grids else None,
            prune=prune,
            max_new_tokens=10,
            eos_token_id=None,
        )
        patch, image = patch + patches, image + len(grids)
        np.testing.assert_array_equal(together.tokens[b], alone.tokens[0])
        np.testing.assert_array_equal(together.keep[b], alone.keep[0])
        np.testing.assert_allclose(together.first_logits[b], alone.first_logits[0], atol=2e-5)
        length = together.attention_mask[b].sum()
        np.testing.assert_array_equal(together.positions[:, b, -length:], alone.positions[:, 0])


@pytest.mark.parametrize(
    "rungs",
    [
        dict(prompt=(47,), patches=(112,), kept=(47,), batch=(4,), decode=(10,)),
        dict(prompt=(300,), patches=(1024,), kept=(16, 17, 18, 19, 20, 24, 32), batch=(8,), decode=(64,)),
    ],
    ids=["exact", "roomy"],
)
def test_any_bucket_equals_any_other(vlm, rungs):
    for prune in (None, Prune(max_remain_ratio=0.3)):
        expected, other = generate(vlm, SAMPLES, prune), generate(with_ladders(vlm, **rungs), SAMPLES, prune)
        np.testing.assert_array_equal(other.tokens, expected.tokens)
        np.testing.assert_array_equal(other.positions, expected.positions)
        np.testing.assert_allclose(other.first_logits, expected.first_logits, atol=2e-5)


@pytest.mark.parametrize("attention", ["einsum", "blockwise", "splash_interpret"])
def test_every_attention_kernel_gives_the_same_answers(vlm, attention):
    other = GlimpseVLM(vlm.model, vlm.hf_config, vlm.processor, ladders=tiny.LADDERS, attention=attention)
    expected, done = generate(vlm, SAMPLES), generate(other, SAMPLES)
    np.testing.assert_array_equal(done.tokens, expected.tokens)
    np.testing.assert_allclose(done.first_logits, expected.first_logits, atol=2e-5)


def test_zero_and_reference_masks_by_config(vlm):
    """`use_zero_masks` keeps the floor only; `use_ref_masks` cannot do without masks."""
    graph, state = nnx.split(vlm.model)

    def configured(**changes):
        model = nnx.merge(graph, state)
        model.glimpse_config = dataclasses.replace(vlm.glimpse_config, **changes)
        return GlimpseVLM(model, vlm.hf_config, vlm.processor, ladders=tiny.LADDERS)

    for floor in (1, 3):
        done = generate(configured(use_zero_masks=True), SAMPLES, Prune(min_remain_num=floor))
        assert [int(keep.sum()) for keep in done.keep] == [floor, floor, 0, floor]
    with pytest.raises(GlimpseError, match=r"use_ref_masks=true: pass Prune\(reference_masks"):
        generate(configured(use_ref_masks=True), SAMPLES)


@pytest.mark.quick
def test_streaming_equals_whole(vlm):
    steps: list[np.ndarray] = []
    whole = generate(vlm, SAMPLES)
    streamed = generate(vlm, SAMPLES, stream=lambda tokens: steps.append(tokens.copy()))
    np.testing.assert_array_equal(np.stack(steps, axis=1), whole.tokens)
    np.testing.assert_array_equal(streamed.tokens, whole.tokens)


def test_eos_ends_a_sample_and_pads(vlm):
    free = generate(vlm, SAMPLES)
    stop = int(free.tokens[0, 4])
    ends = [int(hits[0]) + 1 if (hits := np.flatnonzero(row == stop)).size else 10 for row in free.tokens]
    done = generate(vlm, SAMPLES, eos_token_id=[stop, 9999])
    for b, end in enumerate(ends):
        np.testing.assert_array_equal(done.tokens[b, :end], free.tokens[b, :end])
        assert (done.tokens[b, end:] == tiny.PAD).all()
    assert done.tokens.shape[1] == max(ends)
    assert generate(vlm, SAMPLES[:1], eos_token_id=stop).tokens.shape == (1, ends[0]), "a single sample ends at once"


def test_sampling_follows_the_seed(vlm):
    options = dict(temperature=1.0, top_k=20, top_p=0.9)
    a, b, c = (generate(vlm, SAMPLES, **options, seed=seed).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert (a != generate(vlm, SAMPLES).tokens).any()


def test_glimpse_alone_equals_the_maps_of_generation(vlm):
    done, maps = generate(vlm, SAMPLES), vlm.glimpse(inputs=tiny.inputs(SAMPLES, seed=3))
    assert [[m.shape for m in sample] for sample in maps] == [[(4, 6)], [(3, 3), (2, 5)], [], [(2, 2)]]
    for logits, sample in zip(done.mask_logits, maps, strict=True):
        flat = np.concatenate([m.reshape(-1) for m in sample]) if sample else np.zeros(0)
        np.testing.assert_allclose(flat, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_reference_masks(vlm):
    rng = np.random.default_rng(0)
    masks = [rng.random((4, 6)) < 0.4, [rng.random((3, 3)) < 0.5, rng.random((2, 5)) < 0.5], None, np.zeros(4, bool)]
    done = generate(vlm, SAMPLES, Prune(reference_masks=masks, max_remain_ratio=0.1))  # exactly the masks: no cap, no floor
    np.testing.assert_array_equal(done.keep[0], masks[0].reshape(-1))
    np.testing.assert_array_equal(done.keep[1], np.concatenate([m.reshape(-1) for m in masks[1]]))
    assert done.keep[2].size == 0 and not done.keep[3].any()
    assert np.isposinf(done.mask_logits[0][done.keep[0]]).all() and np.isneginf(done.mask_logits[0][~done.keep[0]]).all()
    one = np.stack([masks[0]])  # an array with the samples in front is as good as a list
    np.testing.assert_array_equal(generate(vlm, SAMPLES[:1], Prune(reference_masks=one)).keep[0], masks[0].reshape(-1))
    with pytest.raises(GlimpseError, match="holds 1 masks for 4 samples"):
        generate(vlm, SAMPLES, Prune(reference_masks=masks[:1]))
    with pytest.raises(GlimpseError, match=r"reference_masks\[0\]"):
        generate(vlm, SAMPLES, Prune(reference_masks=[masks[0].T, *masks[1:]]))


def test_settings_are_checked_first(vlm):
    for options, message in (
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=2.5), "max_new_tokens=2.5"),
        (dict(top_k=2.5), "top_k=2.5"),
        (dict(seed=2**70), "seed="),
        (dict(eos_token_id=[1.5]), "eos_token_id\\[0\\]=1.5"),
        (dict(temperature="1"), "temperature='1': must be a number"),
        (dict(pixel_values_videos=1), "does not take pixel_values_videos: only still images"),
        (dict(max_new_tokens=17), "'decode' ladder, which ends at 16"),
        (dict(temperature=-1), "temperature=-1"),
        (dict(top_p=0), "top_p=0"),
        (dict(prune="all"), "prune must be a Prune"),
        (dict(prune=Prune(anchor_positions=("tl",))), "needs samples with one image"),
    ):
        with pytest.raises(GlimpseError, match=message):
            generate(vlm, SAMPLES, **options)
    with pytest.raises(GlimpseError, match="'prompt' ladder, which ends at 128"):
        generate(vlm, [[200]])
    with pytest.raises(GlimpseError, match="'patches' ladder"):
        generate(vlm, [[3, (20, 20), 4]])
    with pytest.raises(GlimpseError, match="ends with an image token"):
        batch = tiny.inputs([[3, (2, 3)]])
        batch = {**batch, "input_ids": batch["input_ids"][:, :-1], "attention_mask": batch["attention_mask"][:, :-1]}
        vlm.generate(**batch, max_new_tokens=4)


def test_pruning_needs_a_glimpse(vlm):
    bare = GlimpseVLM.from_pretrained(vlm.folder, ladders=tiny.LADDERS)
    with pytest.raises(GlimpseError, match="no glimpse is loaded"):
        generate(bare, SAMPLES)
    batch = tiny.torch_inputs(tiny.inputs(SAMPLES))  # what a processor returns goes in as it is, token types too
    assert bare.generate(**{k: v.numpy() for k, v in batch.items()}, max_new_tokens=1).mask_logits is None


def test_a_later_cut_still_taps_the_glimpse_row(vlm):
    """A cut in front of the glimpse moves rows; the tap follows its row."""
    engine = vlm.engine
    samples = read_samples(vlm.config, **tiny.inputs(SAMPLES))
    stream = engine.embed(engine.prompt(samples, 4, 64, engine.glimpse_rows), None)
    stays = stream.valid & ((stream.image_slot < 0) | (stream.image_slot % 2 == 0))
    short = engine.compact(stream, stays, cut=Cut(-1, "given"), length=48)
    rows = [int(short.glimpse_row[b, short.tap_row[b]]) for b in range(4)]
    assert rows == [engine.glimpse_rows - 1] * 4


def test_nothing_compiles_after_warm_up(vlm):
    """Any mix of pictures, questions, batch sizes and settings inside the ladders."""
    from gp_jax.runtime.clock import COMPILES

    small = with_ladders(vlm, prompt=(48, 64), patches=(256,), kept=(16, 32), batch=(1, 2), decode=(8,))
    assert isinstance(small.engine, Engine)
    small.warm_up(batch=2, patches=256, prompt=64, max_new_tokens=8)
    small.warm_up(prune=None, batch=2, patches=256, prompt=64, max_new_tokens=8)
    small.warm_up(prune=Prune(reference_masks=[]), batch=2, patches=256, prompt=64, max_new_tokens=8)
    before = COMPILES.count
    rng = np.random.default_rng(0)
    for i in range(12):
        rows, columns = rng.integers(1, 7, 2)
        sample = [int(rng.integers(1, 9)), (int(rows), int(columns)), int(rng.integers(1, 6))]
        batch = [sample, [int(rng.integers(1, 40))]][: 1 + i % 2] if i % 5 else [[7]]
        prune = [
            Prune(max_remain_ratio=float(rng.random())),
            None,
            Prune(reduce_threshold=float(rng.random())),
            Prune(fixed_remain_ratio=1.0),
        ]
        options = dict(max_new_tokens=int(rng.integers(1, 9)), temperature=float(i % 3), top_k=i, eos_token_id=[None, 5, [1, 2]][i % 3])
        small.generate(**tiny.inputs(batch, seed=i), prune=prune[i % 4], **options, seed=i)
        if i % 5:
            masks = [rng.random((int(rows), int(columns))) < 0.5, None][: len(batch)]
            small.generate(**tiny.inputs(batch, seed=i), prune=Prune(reference_masks=masks), **options)
    assert COMPILES.count == before
