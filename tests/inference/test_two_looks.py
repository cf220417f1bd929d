"""Two looks: what must not change a result, whatever windows are seen, and what a first look chooses."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models as tiny

from gp_jax import GlimpseError, GlimpseVLM, Ladder, Ladders, Look, Prune, inference_fn, inference_params
from gp_jax.processing.layout import read_samples, vision_input
from gp_jax.processing.looks import second_look
from gp_jax.runtime.clock import COMPILES

# Windows are 2 x 2 visual tokens: odd sizes, an extreme shape, two pictures, text alone, a picture that is too small for a first look.
SAMPLES = [[5, (7, 9), 7], [2, (1, 23), 1, (6, 5), 9], [12], [1, (2, 2), 3]]
EAGER = Look(share=0.25, least=4, threshold=0.0, sure=None, cap=1.0)  # everything is above its threshold


def part(**settings) -> Look:
    """Some windows, never all."""
    return Look(**{"least": 4, "threshold": 1.0, "floor": 0.3, "cap": 0.5, "sure": None} | settings)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny.hf_model(layers=4)
    glimpse = tiny.GLIMPSE | {"le_length": 2, "selected_layers": [0, 1]}
    model.save_pretrained(folder)
    tiny.save_glimpse(folder / "glimpse", model, glimpse, tiny.glimpse_weights(glimpse))
    return GlimpseVLM.from_pretrained(folder, glimpse=folder / "glimpse", ladders=tiny.LADDERS)


@pytest.fixture(scope="module")
def samples(vlm):
    return read_samples(vlm.config, **tiny.inputs(SAMPLES))


def ask(vlm, prompts, look, seed=3, **settings):
    return vlm.generate(**tiny.inputs(prompts, seed=seed), prune=Prune(look=look, **settings), max_new_tokens=6, eos_token_id=None)


def some_windows(sample, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random(len(sample.places)) < 0.5


def same(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.first_logits, other.first_logits, atol=2e-5)
    for name in ("keep", "viewed"):
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.quick
def test_all_windows_are_the_whole_sample(vlm, samples):
    for sample in samples:
        again = second_look(vlm.config, sample, np.ones(len(sample.places), bool))
        for field in dataclasses.fields(sample):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(sample, field.name), field.name)


@pytest.mark.quick
@pytest.mark.parametrize(
    "settings", [{}, {"max_remain_ratio": 0.2}, {"fixed_remain_ratio": 1.0}, {"anchor_positions": ("tl", "br")}], ids=str
)
def test_all_windows_chosen_is_the_ordinary_plan(vlm, settings):
    prompts = SAMPLES[:1] + SAMPLES[2:] if "anchor_positions" in settings else SAMPLES
    inputs = tiny.inputs(prompts, seed=3)
    plain = vlm.generate(**inputs, prune=Prune(**settings), max_new_tokens=6, eos_token_id=None)
    looked = ask(vlm, prompts, EAGER, **settings)
    same(looked, plain)
    np.testing.assert_array_equal(looked.positions, plain.positions)
    assert [look is not None for look in looked.looks] == [any(r * c > 8 for r, c in s.grids) for s in read_samples(vlm.config, **inputs)]
    assert all(view.all() for view in looked.viewed)


@pytest.mark.quick
@pytest.mark.parametrize("number", range(2))
def test_second_look_equals_the_tower_with_other_windows_hidden(vlm, samples, number):
    """The tower on some windows, against the tower on all of them, in which full attention does not see the others."""
    engine, sample = vlm.engine, samples[number]
    seen = some_windows(sample)
    short = second_look(vlm.config, sample, seen)
    assert 0 < short.count < sample.count
    whole = vision_input([sample], vlm.config, 4, engine.vision_slots([sample]))
    hidden = np.append(~seen, False)[whole.patch_window] & (whole.patch_window >= 0)
    expected = engine.see(engine.split(dataclasses.replace(whole, patch_image=np.where(hidden, -1, whole.patch_image)), 4))
    found = engine.see(engine.split(vision_input([short], vlm.config, 4, engine.vision_slots([short])), 4))
    ours, theirs = short.slot_of_token, sample.slot_of_token[short.tokens]
    for a, b in zip((found.tokens, *found.conditions), (expected.tokens, *expected.conditions), strict=True):
        np.testing.assert_allclose(np.asarray(a)[0, ours], np.asarray(b)[0, theirs], atol=1e-4)
    np.testing.assert_array_equal(short.cells, sample.cells[short.tokens])
    image = sample.image_token >= 0
    kept = ~image | np.isin(sample.image_token, short.tokens)
    np.testing.assert_array_equal(short.positions, sample.positions[:, kept])
    np.testing.assert_array_equal(short.ids, sample.ids[kept])
    assert short.next_position == sample.next_position


@pytest.mark.quick
def test_a_batch_equals_its_samples_and_any_bucket_another(vlm):
    look = part()
    together = ask(vlm, SAMPLES, look)
    assert [view.all() for view in together.viewed] == [False, False, True, True]
    shares = [view.mean() for view in together.viewed[:2]]
    assert all(0.2 < share < 0.6 for share in shares)
    inputs, start, images = tiny.inputs(SAMPLES, seed=3), 0, 0
    exact = Ladders(
        patches=Ladder("patches", tuple(range(16, 513, 16))),
        prompt=Ladder("prompt", tuple(range(1, 129))),
        kept=Ladder("kept", tuple(range(1, 129))),
        decode=Ladder("decode", (6,)),
        batch=Ladder("batch", (1, 2, 3, 4)),
    )
    fitted = GlimpseVLM(vlm.model, vlm.hf_config, vlm.processor, ladders=exact)
    for number, prompt in enumerate(SAMPLES):
        count = sum(isinstance(entry, tuple) for entry in prompt)
        grids = None if not count else inputs["image_grid_thw"][images : images + count]
        patches = 0 if not count else int(grids.prod(axis=1).sum())
        alone_inputs = dict(
            input_ids=inputs["input_ids"][number : number + 1],
            attention_mask=inputs["attention_mask"][number : number + 1],
            pixel_values=None if not count else inputs["pixel_values"][start : start + patches],
            image_grid_thw=grids,
        )
        start, images = start + patches, images + count
        for model in (vlm, fitted) if number == 1 else (vlm,):
            alone = model.generate(**alone_inputs, prune=Prune(look=look), max_new_tokens=6, eos_token_id=None)
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[number])
            np.testing.assert_array_equal(alone.keep[0], together.keep[number])
            np.testing.assert_array_equal(alone.viewed[0], together.viewed[number])
            np.testing.assert_allclose(alone.first_logits[0], together.first_logits[number], atol=2e-5)


def test_nothing_compiles_after_warm_up(vlm):
    ladders = Ladders(
        patches=Ladder("patches", (64, 160, 320)),
        prompt=Ladder("prompt", (48, 96)),
        kept=Ladder("kept", (32,)),
        decode=Ladder("decode", (8,)),
        batch=Ladder("batch", (2,)),
    )
    fresh = GlimpseVLM(vlm.model, vlm.hf_config, vlm.processor, ladders=ladders)
    fresh.warm_up(prune=Prune(look=part(), fixed_remain_ratio=0.5, method="random"), batch=2)
    before = COMPILES.count
    for prompts in (SAMPLES[:2], SAMPLES[2:], [[3, (8, 8), 4], [5, (3, 20), 1]]):
        for look in (part(), part(floor=0.1, cap=0.9, threshold=0.5), EAGER):
            fresh.generate(
                **tiny.inputs(prompts), prune=Prune(look=look, fixed_remain_ratio=0.5, method="random"), max_new_tokens=8, temperature=0.5
            )
    assert COMPILES.count == before


@pytest.mark.quick
def test_given_windows_need_no_first_look(vlm, samples):
    grids = [sample.grids for sample in samples]
    masks = [[np.zeros(grid, bool) for grid in own] for own in grids]
    masks[0][0][0, 0] = masks[1][1][5, 4] = True
    done = ask(vlm, SAMPLES, Look(windows=[masks[0], masks[1], None, None]))
    assert done.looks == [None] * 4 and [int(view.sum()) for view in done.viewed] == [4, 2, 0, 4]
    assert done.viewed[0].reshape(7, 9)[:2, :2].all() and done.windows[1] == ((), (2,))
    assert (done.seen[:, 0] == [4, 2, 0, 4]).all()
    nothing = ask(vlm, SAMPLES[:1], Look(windows=[np.zeros((7, 9), bool)]))
    assert not nothing.viewed[0].any() and not nothing.keep[0].any() and np.isfinite(nothing.first_logits).all()


@pytest.mark.quick
def test_shares_are_of_whole_pictures(vlm):
    done = ask(vlm, SAMPLES[:1], part(), fixed_remain_ratio=0.1)
    assert done.keep[0].sum() == 6 and done.seen[0, 0] == done.viewed[0].sum() and (done.keep[0] <= done.viewed[0]).all()
    masks = [np.ones((7, 9), bool)]
    by_mask = ask(vlm, SAMPLES[:1], part(), reference_masks=masks)
    np.testing.assert_array_equal(by_mask.keep[0], by_mask.viewed[0])
    anchored = ask(vlm, SAMPLES[:1], part(floor=0.05, cap=0.05), anchor_positions=("br",))
    assert anchored.keep[0][-1] and anchored.viewed[0][-1]


@pytest.mark.quick
def test_an_unsure_map_sees_the_whole_picture(vlm):
    sure, peakless = part(sure=0.0, floor=0.2), part(sure=1.0)
    assert ask(vlm, SAMPLES[:1], sure).viewed[0].mean() < 1 and ask(vlm, SAMPLES[:1], peakless).viewed[0].all()
    many = part(sure=0.0, threshold=0.0)
    assert ask(vlm, SAMPLES[:1], many).viewed[0].all(), "more than the cap"


@pytest.mark.quick
def test_dense_plan_behind_a_look(vlm):
    """Nothing is cut, but only the windows are seen."""
    done = ask(vlm, SAMPLES[:1], part(), fixed_remain_ratio=1.0)
    assert done.keep[0].sum() == done.viewed[0].sum() < 63 and done.mask_logits is None


def test_one_traced_program_looks_as_the_engine_does(vlm):
    """Windows chosen on the device, several rungs for what is seen, numbers of the look as inputs; several samples and rows of padding."""
    buckets = Ladders(
        patches=Ladder("patches", (256, 512)),
        prompt=Ladder("prompt", (64, 96)),
        kept=Ladder("kept", (48,)),
        batch=Ladder("batch", (4,)),
    )
    infer = jax.jit(inference_fn(vlm.config, Prune(look=part()), buckets, 6, glimpse=vlm.glimpse_config, eos_token_id=None))
    params, shares = inference_params(vlm.model), []
    rules = (part(), part(margin=1, floor=0.1, cap=0.9), part(sure=0.3, cap=0.9, threshold=0.5, tokens=6), EAGER)
    for look, settings in zip(rules, ({}, {"anchor_positions": ("br",)}, {"max_remain_ratio": 0.1}, {}), strict=True):
        prompts, prune = SAMPLES[:1] + SAMPLES[2:] if settings else SAMPLES, Prune(look=look, **settings)
        made = vlm.inference_inputs(inputs=tiny.inputs(prompts, seed=3), prune=prune, buckets=buckets)
        out = {name: np.asarray(x) for name, x in infer(params, made).items()}
        done = ask(vlm, prompts, look, **settings)
        np.testing.assert_array_equal(out["tokens"][: len(prompts)], done.tokens)
        np.testing.assert_allclose(out["first_logits"][: len(prompts)], done.first_logits, atol=2e-5)
        for b, (keep, viewed) in enumerate(zip(done.keep, done.viewed, strict=True)):
            np.testing.assert_array_equal(out["keep"][b, : keep.size], keep)
            np.testing.assert_array_equal(out["seen"][b, : keep.size], viewed)
            assert not out["seen"][b, keep.size :].any() and out["visual_tokens"][b] == keep.size
        shares.append(float(np.mean(done.viewed[0])))
    assert shares[0] < 0.6 and shares[3] == 1, shares


BAD = {
    "look must be a Look": lambda: Prune(look=0.25),
    "floor=0.5 is more than cap=0.4": lambda: Look(floor=0.5, cap=0.4),
    "share=0": lambda: Look(share=0),
    "margin=-1": lambda: Look(margin=-1),
    "windows must be a list": lambda: Look(windows=3),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", BAD)
def test_impossible_settings(message):
    with pytest.raises(GlimpseError, match=message):
        BAD[message]()


@pytest.mark.quick
def test_impossible_requests(vlm):
    with pytest.raises(GlimpseError, match="holds 1 masks for 2 samples"):
        ask(vlm, SAMPLES[:2], Look(windows=[None]))
    with pytest.raises(GlimpseError, match=r"look.windows\[0\].*do not match"):
        ask(vlm, SAMPLES[:1], Look(windows=[np.ones((3, 3), bool)]))
    with pytest.raises(GlimpseError, match="ends with an image token"):
        cut = {name: value[:, :-1] for name, value in tiny.inputs(SAMPLES[:1]).items() if name in ("input_ids", "attention_mask")}
        cut = {name: value[:, :-7] for name, value in cut.items()}  # what stands behind the picture
        vlm.generate(**tiny.inputs(SAMPLES[:1]) | cut, prune=Prune(look=EAGER), max_new_tokens=4)
    with pytest.raises(GlimpseError, match="raise Ladders"):
        ask(vlm, [[5, (40, 40), 7]], EAGER)
