"""The published methods: each scorer against its formula written out, and all of them on the engine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from einops import rearrange

from gp_jax import GlimpseError, GlimpseVLM, Ladder, Ladders, Prune, pipeline
from gp_jax.config.model import GlimpseConfig
from gp_jax.evaluation.plans import make_plan
from gp_jax.inference.requests import keep_rules, resolve
from gp_jax.ops.received import attention_received
from gp_jax.ops.rope import grid_angles, rotate
from gp_jax.processing.layout import prompt_input, read_samples, vision_input
from gp_jax.processing.views import shrunk_grid
from gp_jax.pruning.plan import PUBLISHED, SCORER_OF, SCORERS
from gp_jax.pruning.rule import METHODS
from gp_jax.pruning.scorers import attention, cdpruner, visionzip, vscan
from gp_jax.pruning.scorers.scorer import Cut, Scoring
from gp_jax.runtime.clock import COMPILES

SAMPLES = [[5, (9, 11), 7], [2, (3, 3), 1, (2, 5), 9], [12], [1, (2, 2), 3]]
COUNTS = [99, 19, 0, 4]
DEPTH = 4


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny.hf_model(layers=DEPTH)
    model.save_pretrained(folder)
    return GlimpseVLM.from_pretrained(folder, ladders=tiny.LADDERS)


@pytest.fixture(scope="module")
def scene(vlm):
    """Samples and what a scorer sees of them, with random features: padding anywhere, several sizes, one without an image."""
    samples = read_samples(vlm.config, **tiny.inputs(SAMPLES))
    slots = vlm.engine.vision_slots(samples) + 16
    vision, rng = vision_input(samples, vlm.config, 4, slots), np.random.default_rng(0)
    features = jax.jit(lambda v: vlm.model.vision(v, watch=(1, 3)))(vision)
    random = {"received": (4, slots), "keys": (4, slots, 12)}
    random = {
        name: {b: rng.gamma(1.0, size=shape).astype(np.float32) - 0.3 * (name == "keys") for b in (1, 3)} for name, shape in random.items()
    }
    made = dataclasses.replace(features, tokens=jnp.asarray(rng.normal(size=features.tokens.shape), jnp.float32), **random)
    stream = pipeline.embed(vlm.model, jax.tree.map(jnp.asarray, prompt_input(samples, vlm.config, 4, 128, 0)), made)
    return samples, vision, features, made, stream


def scoring(vlm, scene, method: str, ratio: float, cut: int = 0, stream=None) -> Scoring:
    samples, vision, _, made, embedded = scene
    plan, prune = resolve(Prune(method=method, fixed_remain_ratio=ratio), None, DEPTH)
    limits = keep_rules(samples, plan, prune, vlm.engine.ladders.batch.fit(len(samples)), vision.token_image.shape[1])[cut].limits
    return Scoring(vlm.model, plan[cut], stream or embedded, vision, made, limits)


def chosen(x: Scoring, samples) -> list[set[int]]:
    """Kept visual tokens per sample, numbered as in the prompt."""
    scorer = SCORERS[x.cut.scorer]
    keep = jax.jit(lambda v, f, s: pipeline.score(x.model, s, v, f, x.cut, x.limits))(x.vision, x.features, x.stream)[1]
    assert scorer.merge is None or x.cut.after == -1
    return [set(np.flatnonzero(np.asarray(keep)[b, sample.slot_of_token]).tolist()) for b, sample in enumerate(samples)]


def of(values, samples, b: int) -> np.ndarray:
    """A sample's values in prompt order, float64."""
    return np.asarray(values, np.float64)[b, samples[b].slot_of_token]


def kept(ratio: float, n: int) -> int:
    return max(min(1, n), int(ratio * n))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


@pytest.mark.parametrize("ratio", [0.1, 0.4, 1.0])
def test_divprune(vlm, scene, ratio):
    samples = scene[0]
    found = chosen(scoring(vlm, scene, "divprune", ratio), samples)
    for b, n in enumerate(COUNTS):
        tokens, picked = of(scene[3].tokens, samples, b), []
        distance = 1 - cosine(tokens, tokens) if n else np.zeros((0, 0))
        for step in range(kept(ratio, n)):
            worth = np.sort(distance, axis=0)[1] if step == 0 else distance[picked].min(axis=0)
            worth[picked] = -np.inf
            picked.append(int(worth.argmax()))
        assert found[b] == set(picked)


@pytest.mark.parametrize("ratio", [0.05, 0.25])
def test_cdpruner_is_the_greedy_determinant(vlm, scene, ratio):
    samples, stream = scene[0], scene[4]
    x = scoring(vlm, scene, "cdpruner", ratio)
    found, text = chosen(x, samples), np.asarray(cdpruner.instruction(x))
    for b, n in enumerate(COUNTS):
        if not n:
            assert not found[b] and not text[b].any()
            continue
        first = int(np.argmax(samples[b].image_token >= 0))
        words = np.array([i for i in range(first, samples[b].ids.size) if samples[b].image_token[i] < 0])
        assert np.flatnonzero(text[b]).tolist() == words.tolist()
        tokens = of(scene[3].tokens, samples, b)
        relevance = cosine(tokens, np.asarray(stream.hidden, np.float64)[b, words]).mean(axis=1)
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        kernel, picked = relevance[:, None] * cosine(tokens, tokens) * relevance, []
        for _ in range(kept(ratio, n)):
            left = [i for i in range(n) if i not in picked]
            picked.append(max(left, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*picked, i], [*picked, i])])[1]))
        assert found[b] == set(picked)


def test_cdpruner_goes_on_when_nothing_is_new():
    """Equal tokens span one direction; the rest still has an order, without NaN."""
    turn = cdpruner.greedy(jnp.ones((6, 3)), jnp.array([0.2, 1.0, 0.5, 0.4, 0.3, 0.1]), jnp.arange(6) < 5, jnp.int32(5))
    assert turn[1] == 0 and sorted(turn[:5].tolist()) == [0, 1, 2, 3, 4] and turn[5] == 6


@pytest.mark.parametrize("ratio", [0.04, 0.111, 0.5, 1.0])
def test_visionzip(vlm, scene, ratio):
    samples, features = scene[0], scene[3]
    x = scoring(vlm, scene, "visionzip", ratio)
    found = chosen(x, samples)
    keep = np.zeros(x.present.shape, bool)
    for b, picked in enumerate(found):
        keep[b, samples[b].slot_of_token[sorted(picked)]] = True
    merged = jax.jit(lambda k, f: SCORERS["visionzip"].merge(dataclasses.replace(x, features=f), k))(keep, features)
    for b, n in enumerate(COUNTS):
        received, keys, tokens = of(features.received[3], samples, b), of(features.keys[3], samples, b), of(features.tokens, samples, b)
        count = kept(ratio, n)
        few = max(1, int(0.05 * n) if count > 0.05 * n else count * 5 // 32) if count > 1 else 0
        dominant = np.argsort(-received, kind="stable")[: count - few]
        rest = np.setdiff1d(np.arange(n), dominant)
        targets = rest[:: max(1, rest.size // max(few, 1))][:few]
        assert found[b] == {*dominant.tolist(), *targets.tolist()} and len(found[b]) == count
        expected = tokens.copy()
        joined = [t for t in rest if t not in targets]
        if few and joined:
            home = targets[cosine(keys[joined], keys[targets]).argmax(axis=1)]
            for target in set(home.tolist()):
                expected[target] += tokens[np.array(joined)[home == target]].mean(axis=0)
        np.testing.assert_allclose(of(merged, samples, b)[sorted(found[b])], expected[sorted(found[b])], atol=1e-5)


@pytest.mark.parametrize("n", [1, 19, 99, 576, 1280, 2049])
def test_visionzips_parts(n):
    """As released: r - 0.05 dominant and 0.05 contextual without a class token, 54 + 10 of 64 with one."""
    for ratio in (0.02, 0.05, 0.111, 0.222, 0.333):
        count = kept(ratio, n)
        few = int(visionzip.contextual_count(jnp.int32(count), jnp.int32(n), class_token=False))
        assert 0 <= few < count and (few >= 1 or count == 1)
        if ratio > 0.05 and n > 19:
            dominant, contextual = max(1, int((ratio - 0.05) * n)), max(int(0.05 * n), 1)
            assert few == contextual and count - few in (dominant, dominant + 1)
    for count, few in ((64, 10), (128, 20), (192, 30), (2, 1), (1, 0), (0, 0)):
        assert visionzip.contextual_count(jnp.int32(count), jnp.int32(n), class_token=True) == few


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.4])
def test_vscan_in_the_tower(vlm, scene, ratio):
    samples, features = scene[0], scene[3]
    x = scoring(vlm, scene, "vscan", ratio)
    found = chosen(x, samples)
    keep = np.zeros(x.present.shape, bool)
    for b, picked in enumerate(found):
        keep[b, samples[b].slot_of_token[sorted(picked)]] = True
    merged = jax.jit(lambda k, f: vscan.merge(dataclasses.replace(x, features=f), k))(keep, features)
    for b, n in enumerate(COUNTS):
        local, whole = of(features.received[1], samples, b), of(features.received[3], samples, b)
        windows, count = [], kept(min(1.0, 3 * ratio), n)
        for image, (rows, columns) in enumerate(samples[b].grids):
            for row, column in np.ndindex(rows, columns):
                windows.append((image, min(row // 4, max(1, rows // 4) - 1), min(column // 4, max(1, columns // 4) - 1)))
        taken, picked = dict.fromkeys(windows, 0), []
        for token in np.argsort(-local):
            if len(picked) < count // 2 and taken[windows[token]] < -(-(count // 2) // len(taken)):
                taken[windows[token]] += 1
                picked.append(int(token))
        if n > 50:  # fewer windows than tokens wanted elsewhere: the scan is then filled up by attention alone
            assert len(picked) == count // 2
        for token in np.argsort(-local):
            if len(picked) < count // 2 and token not in picked:
                picked.append(int(token))
        picked += [int(t) for t in np.argsort(-whole) if t not in picked][: count - len(picked)]
        assert found[b] == set(picked)
        tokens, stay = of(features.tokens, samples, b), np.array(sorted(picked), int)
        gone = np.setdiff1d(np.arange(n), stay)
        home = stay[cosine(tokens[gone], tokens[stay]).argmax(axis=1)] if gone.size else gone
        for token in stay:
            mean = np.concatenate([tokens[token : token + 1], tokens[gone[home == token]]]).mean(axis=0)
            np.testing.assert_allclose(of(merged, samples, b)[token], mean, atol=1e-5)


def test_attention_received():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, 3, 24, 8)).astype(np.float32) for _ in range(2))
    segment = np.repeat([[0, 0, 1, -1, 2, -1], [-1, -1, 0, 0, 0, 0]], 4, axis=1)
    expected = np.zeros((2, 24))
    for b in range(2):
        for number in set(segment[b].tolist()) - {-1}:
            own = np.flatnonzero(segment[b] == number)
            logits = np.einsum("nth,nsh->nts", q[b][:, own], k[b][:, own]) / 8**0.5
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            expected[b, own] = weights.mean(0).sum(0)
    np.testing.assert_allclose(attention_received(q, k, segment), expected, atol=1e-5)


def test_the_tower_is_watched_where_it_attends(vlm, scene):
    """Against the blocks run one by one, windows as segments, and the attention matrix written out."""
    samples, vision, features, _, _ = scene
    tower, config, unit = vlm.model.vision, vlm.config.vision, vlm.config.vision.merge_unit
    x, angles = tower.patch_embed(vision.patches), grid_angles(vision.patch_hw, config.head_dim)
    for index, block in enumerate(tower.blocks):
        if index in (1, 3):
            q, k, _ = np.split(np.asarray(block.attn.qkv(block.norm1(x)), np.float32), 3, axis=-1)
            q, k = (rotate(rearrange(a, "b s (n h) -> b n s h", n=config.num_heads), angles) for a in (q, k))
            logits = np.einsum("bnth,bnsh->bnts", q, k) * config.head_dim**-0.5
            image = vision.patch_image
            logits = np.where((image[:, :, None] == image[:, None])[:, None], logits, -1e9)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights = (weights / weights.sum(-1, keepdims=True)).mean(1) * (image >= 0)[:, :, None]
            received = rearrange(weights.sum(1), "b (m u) -> b m u", u=unit).mean(-1)
            keys = rearrange(np.asarray(k), "b n (m u) h -> b m (n u) h", u=unit).mean(2)
            for b, n in enumerate(COUNTS):
                np.testing.assert_allclose(of(features.received[index], samples, b), of(received, samples, b), atol=1e-4)
                np.testing.assert_allclose(of(features.keys[index], samples, b), of(keys, samples, b), atol=1e-5)
                assert of(features.received[index], samples, b).sum() == pytest.approx(n, abs=1e-3)
        x = block(x, angles, vision.patch_image if index in (1, 3) else vision.patch_window)


def test_vscan_in_the_decoder(vlm, scene):
    """The last token's attention to what is there, mean over heads, from queries and keys without rope."""
    samples, stream = scene[0], pipeline.run(vlm.model, scene[4], 0, DEPTH // 2)
    x = scoring(vlm, scene, "vscan", 0.3, cut=1, stream=stream)
    assert x.cut.after == DEPTH // 2 - 1 and x.cut.scorer == "vscan"
    ours, layer = vscan.score(x), vlm.model.decoder.layers[DEPTH // 2]
    hidden, attention_of, text = layer.input_layernorm(stream.hidden), layer.self_attn, vlm.config.text
    q, k = (np.asarray(f(hidden), np.float64) for f in (attention_of.q_proj, attention_of.k_proj))
    q, k = (rearrange(a, "b t (n h) -> b n t h", h=text.head_dim) for a in (q, k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    for b in (0, 1, 3):
        rows = np.flatnonzero(np.asarray(stream.valid)[b])
        logits = np.einsum("nh,nth->nt", q[b, :, int(stream.tap_row[b])], k[b][:, rows]) / text.head_dim**0.5
        share = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(0)
        visual = np.asarray(stream.image_slot)[b, rows] >= 0
        np.testing.assert_allclose(of(ours, samples, b), np.log(share[visual]), atol=1e-5)


def test_next_layers_attention_is_what_that_layer_pays(vlm, scene):
    """PyramidDrop scores with the layer behind the cut: equal to its own recorded attention."""
    samples, vision, features, made, stream = scene
    x = scoring(vlm, scene, "pyramiddrop", 0.3, cut=1)
    after = x.cut.after
    stream = pipeline.run(vlm.model, stream, 0, after + 1)
    ahead = pipeline.run(vlm.model, stream, after + 1, after + 2, taps=(after + 1,))
    theirs = attention.score(dataclasses.replace(x, stream=ahead, cut=Cut(after + 1, "attention")))
    ours = attention.next_layer(dataclasses.replace(x, stream=stream))
    for b in (0, 1, 3):
        np.testing.assert_allclose(of(ours, samples, b), of(theirs, samples, b), atol=1e-5)


# On the engine --------------------------------------------------------------------------------------------------------------


def run(vlm, samples, prune, inputs=None, steps=5):
    return vlm.generate(**(inputs or tiny.inputs(samples, seed=3)), prune=prune, max_new_tokens=steps, eos_token_id=None)


RATIO = 0.3


@pytest.mark.parametrize("method", PUBLISHED)
def test_methods_keep_their_share_and_a_batch_equals_its_samples(vlm, method):
    prune = Prune(method=method, fixed_remain_ratio=RATIO)
    together, whole, patch, image = run(vlm, SAMPLES, prune), tiny.inputs(SAMPLES, seed=3), 0, 0
    assert [int(keep.sum()) for keep in together.keep] == [kept(RATIO, n) for n in COUNTS]
    part = {p: [kept(RATIO**p, n) for n in COUNTS] for p in (1 / 3, 2 / 3)} | {
        3: [kept(3 * RATIO, n) for n in COUNTS],
        1: [kept(RATIO, n) for n in COUNTS],
    }
    seen = {
        "fastv": [COUNTS, COUNTS, part[1], part[1]],
        "pyramiddrop": [COUNTS, part[1 / 3], part[2 / 3], part[1]],
        "vscan": [part[3], part[3], part[1], part[1]],
    }.get(method, [part[1]] * DEPTH)
    np.testing.assert_array_equal(together.seen, np.transpose(seen))
    np.testing.assert_array_equal(
        together.cached, together.seen if method in ("fastv", "pyramiddrop") else together.seen[:, -1:].repeat(DEPTH, 1)
    )
    for b, sample in enumerate(SAMPLES):
        grids = [s for s in sample if not isinstance(s, int)]
        patches = 4 * sum(r * c for r, c in grids)
        alone = dict(
            input_ids=whole["input_ids"][b : b + 1, whole["attention_mask"][b].astype(bool)],
            pixel_values=whole["pixel_values"][patch : patch + patches] if grids else None,
            image_grid_thw=whole["image_grid_thw"][image : image + len(grids)] if grids else None,
        )
        patch, image = patch + patches, image + len(grids)
        done = run(vlm, None, prune, alone)
        np.testing.assert_array_equal(together.keep[b], done.keep[0])
        np.testing.assert_array_equal(together.tokens[b], done.tokens[0])
        np.testing.assert_allclose(together.first_logits[b], done.first_logits[0], atol=3e-5)


def test_all_kept_is_dense_and_only_merging_changes_tokens(vlm, monkeypatch):
    """Caches of different lengths decode as one does; a cut before layer 0 is as if the dropped tokens had never been there."""
    dense, everything = run(vlm, SAMPLES, None), [Prune(method=m, fixed_remain_ratio=1.0) for m in ("fastv", "pyramiddrop", "visionzip")]
    assert all(run(vlm, SAMPLES, prune).mask_logits is None for prune in everything), "nobody looks"
    monkeypatch.setattr(Prune, "keeps_everything", False)
    for prune in everything:
        done = run(vlm, SAMPLES, prune)
        assert done.mask_logits is not None
        np.testing.assert_array_equal(done.tokens, dense.tokens)
    for method, same in (("divprune", True), ("visionzip", False)):
        done = run(vlm, SAMPLES, Prune(method=method, fixed_remain_ratio=RATIO))
        bare = run(vlm, SAMPLES, Prune(reference_masks=done.keep, after=-1))
        assert (np.abs(done.first_logits[0] - bare.first_logits[0]).max() < 1e-5) == same


def test_settings():
    assert set(METHODS) == {*PUBLISHED, *SCORER_OF}
    with pytest.raises(GlimpseError, match="says itself where it cuts"):
        resolve(Prune(method="divprune", fixed_remain_ratio=0.1, after=2), None, 8)
    with pytest.raises(GlimpseError, match="needs a deeper model than 2 layers"):
        resolve(Prune(method="pyramiddrop", fixed_remain_ratio=0.1), None, 2)
    with pytest.raises(GlimpseError, match="after=7"):
        resolve(Prune(method="fastv", fixed_remain_ratio=0.1, after=7), None, 8)
    with pytest.raises(GlimpseError, match="say how much to keep"):
        Prune(method="vscan")
    assert [cut.after for cut in resolve(Prune(method="pyramiddrop", fixed_remain_ratio=0.1), None, 32)[0]] == [7, 15, 23]
    assert [cut.after for cut in resolve(Prune(method="fastv", fixed_remain_ratio=0.1), None, 28)[0]] == [1]
    assert [cut.after for cut in resolve(Prune(method="vscan", fixed_remain_ratio=0.1), None, 36)[0]] == [-1, 17]
    with pytest.raises(GlimpseError, match="did you mean 'visionzip'"):
        make_plan("vision-zip", None)
    plan = make_plan("visionzip-11.1", None)
    assert not plan.matched and plan.rule([], plan.ratio).fixed_remain_ratio == pytest.approx(0.111)
    fixed = make_plan("glimpse-fixed-11.1", GlimpseConfig((0,), 0))
    assert fixed.rule([], None).fixed_remain_ratio == pytest.approx(0.111)
    above = make_plan("glimpse-above-30", GlimpseConfig((0,), 0, reduce_threshold=0.6)).rule([], None)
    assert above.reduce_threshold == pytest.approx(0.3) and above.fixed_remain_ratio is above.max_remain_ratio is None
    assert make_plan("downsample", None).shrink and make_plan("downsample", None).matched


@pytest.mark.parametrize("method", ["fastv", "vscan"])
def test_nothing_compiles_after_warm_up(vlm, method):
    names = dict(prompt=(64,), patches=(128, 256), kept=(16, 32), batch=(2,), decode=(4,))
    small = GlimpseVLM(
        vlm.model, vlm.hf_config, vlm.processor, ladders=Ladders(**{name: Ladder(name, rungs) for name, rungs in names.items()})
    )
    small.warm_up(prune=Prune(method=method, fixed_remain_ratio=0.5), batch=2, patches=256, prompt=64, max_new_tokens=4)
    before, rng = COMPILES.count, np.random.default_rng(0)
    for i in range(8):
        sample = [int(rng.integers(1, 9)), tuple(int(n) for n in rng.integers(1, 7, 2)), int(rng.integers(1, 9))]
        batch = [sample, [int(rng.integers(1, 40))]][: 1 + i % 2] if i % 4 else [[7]]
        run(small, batch, Prune(method=method, fixed_remain_ratio=float(rng.random())), steps=4)
    assert COMPILES.count == before


@pytest.mark.parametrize("grid", [(1, 1), (3, 40), (18, 18), (24, 11)])
def test_shrunk_grids_are_near_in_number_and_shape(grid):
    for ratio in (0.0, 0.05, 0.111, 0.333, 1.0):
        rows, columns = shrunk_grid(grid, ratio)
        target = max(1, int(ratio * grid[0] * grid[1]))
        assert 0.6 * target <= rows * columns <= target and rows <= grid[0] and columns <= grid[1]
        assert ratio < 1.0 or (rows, columns) == grid
