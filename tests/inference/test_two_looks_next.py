"""Two looks of LLaVA-NeXT: the overview, then tiles of the detail. LLaVA-1.5 has no parts to choose."""

import jax
import numpy as np
import pytest
import tiny_llava as tiny

from gp_jax import GlimpseError, GlimpseVLM, Ladder, Ladders, Look, Prune, inference_fn, inference_params
from gp_jax.data.samples import LookSizes, SampleMaker
from gp_jax.evaluation.plans import make_plans
from gp_jax.processing.layout import ARRAYS, read_samples
from gp_jax.processing.looks import FirstSize, first_look, line_of_rows

SIZES = ((90, 60), (50, 130), (56, 112))  # two are padded to whole tiles
ALL = Look(threshold=0.0, sure=None, cap=1.0)
NEW = 4


def part(**settings) -> Look:
    return Look(**{"threshold": 1.0, "floor": 0.3, "cap": 0.5, "sure": None} | settings)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny.save_hf(tmp_path_factory.mktemp("model"), tiny.hf_model(following=True))
    return GlimpseVLM.from_pretrained(folder, glimpse=tiny.save_glimpse(folder / "glimpse"), ladders=tiny.LADDERS)


@pytest.fixture(scope="module")
def raw(vlm):
    return vlm.processor([[tiny.photo(*size)] for size in SIZES], ["Who?"] * len(SIZES)).inputs


def ask(vlm, raw, look):
    return vlm.generate(**raw, prune=Prune(look=look), max_new_tokens=NEW, eos_token_id=None)


def test_all_tiles_chosen_is_the_ordinary_plan(vlm, raw):
    plain, looked = ask(vlm, raw, None), ask(vlm, raw, ALL)
    np.testing.assert_array_equal(looked.tokens, plain.tokens)
    np.testing.assert_allclose(looked.first_logits, plain.first_logits, atol=2e-5)
    assert all(look is not None and view.all() for look, view in zip(looked.looks, looked.viewed, strict=True))


def test_some_tiles(vlm, raw):
    """The overview is always seen, tiles whole, and a line break only behind a line of which something is seen."""
    samples, done = read_samples(vlm.config, *(raw.get(name) for name in ARRAYS)), ask(vlm, raw, part())
    for sample, view, windows in zip(samples, done.viewed, done.windows, strict=True):
        count = sample.grids[0][0] * sample.grids[0][1]
        assert view[:count].all() and 0 < view[count:].sum() < view.size - count and sum(windows[1]) == view[count:].sum()
        short = first_look(vlm.config, sample, FirstSize(1, None, 1))
        assert short.count == count and (line_of_rows(vlm.config, short) == -1).all(), "no breaks behind an overview"
        np.testing.assert_array_equal(short.positions[0], np.arange(short.ids.size))
    masks = [[np.zeros(grid, bool) for grid in sample.grids] for sample in samples]
    for own in masks:
        own[1][0, 0] = True
    told = vlm.generate(**raw, prune=Prune(look=Look(windows=masks), fixed_remain_ratio=1.0), max_new_tokens=1)
    for b, (sample, own, view) in enumerate(zip(samples, masks, told.viewed, strict=True)):
        detail = view[own[0].size :].reshape(own[1].shape)
        lines = detail.any(axis=1).sum()
        text = sample.ids.size - sample.count - own[1].shape[0]
        assert detail[0, 0] and told.attention_mask.sum(axis=1)[b] == text + view.sum() + lines


def test_the_traced_program_sees_the_same_tiles(vlm, raw):
    buckets = Ladders(
        patches=Ladder("patches", (48, 80)), prompt=Ladder("prompt", (240,)), kept=Ladder("kept", (160,)), batch=Ladder("batch", (3,))
    )
    prune, done = Prune(look=part()), ask(vlm, raw, part())
    infer = jax.jit(inference_fn(vlm.config, prune, buckets, NEW, glimpse=vlm.glimpse_config, eos_token_id=None))
    out = infer(inference_params(vlm.model), vlm.inference_inputs(inputs=raw, prune=prune, buckets=buckets))
    np.testing.assert_array_equal(out["tokens"], done.tokens)
    np.testing.assert_allclose(out["first_logits"], done.first_logits, atol=2e-5)
    for b, (keep, view) in enumerate(zip(done.keep, done.viewed, strict=True)):
        np.testing.assert_array_equal(out["keep"][b, : keep.size], keep)
        np.testing.assert_array_equal(out["seen"][b, : keep.size], view)


def test_training_sees_overviews(vlm):
    import io

    from gp_jax.data.collate import lengths
    from gp_jax.data.record import Entry, Record

    file = io.BytesIO()
    tiny.photo(90, 60).save(file, "PNG")
    record = Record("r:1", "d", "Who?", "red", (file.getvalue(),), (((0.0, 0.0, 0.45, 0.45),),), (None,))
    maker = SampleMaker(vlm.processor, 1, looks=LookSizes(1.0, (0.25,), 1, 0))
    made, said = maker.make(record), maker.measure([Entry("r:1", "d", "Who?", "red", ((90, 60),))], "")[0]
    assert made.prompt.count == said.visual == 16 and said.shape == lengths(16, made.prompt.ids.size, made.answer.size, 1)
    mask = made.reference.reshape(4, 4)
    assert mask[:2, :2].all() and not mask[2:].any() and not mask[:, 2:].any()


def test_llava_1_5_is_refused_in_one_line(tmp_path):
    folder = tiny.save_hf(tmp_path, tiny.hf_model())
    vlm = GlimpseVLM.from_pretrained(folder, glimpse=tiny.save_glimpse(folder / "glimpse"), ladders=tiny.LADDERS)
    raw = vlm.processor([[tiny.photo(90, 60)]], ["Who?"]).inputs
    for look in (ALL, Look(windows=[None])):
        with pytest.raises(GlimpseError, match="^look: this model sees a picture in one small square, of which it cannot see a part$"):
            ask(vlm, raw, look)
        with pytest.raises(GlimpseError, match="one small square"):
            inference_fn(vlm.config, Prune(look=look), glimpse=vlm.glimpse_config)
    with pytest.raises(GlimpseError, match="plan 'look': this model sees a picture in one small square"):
        make_plans(["dense", "look"], vlm.glimpse_config, vlm.processor.shrinks, vlm.config.vision.parts)
