"""Two looks of Qwen3-VL, whose tower has no attention windows: blocks of 4 x 4 visual tokens, positions and DeepStack of whole pictures."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models as tiny
import tiny_qwen3 as tiny3

from gp_jax import GlimpseVLM, Ladder, Ladders, Look, Prune, inference_fn, inference_params
from gp_jax.processing.layout import read_samples, vision_input
from gp_jax.processing.looks import second_look

SAMPLES = [[5, (9, 10), 7], [2, (1, 23), 1, (6, 5), 9], [12], [1, (2, 2), 3]]
ALL = Look(share=0.25, least=4, threshold=0.0, sure=None, cap=1.0)
SOME = Look(share=0.25, least=4, threshold=1.0, floor=0.3, cap=0.5, sure=None)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny3.hf_model(**tiny3.DEEP).save_pretrained(folder)
    return GlimpseVLM.from_pretrained(folder, glimpse=tiny3.save_glimpse(folder / "glimpse"), ladders=tiny.LADDERS)


def inputs():
    return tiny.inputs(SAMPLES, patch=tiny3.PATCH, seed=3)


def ask(vlm, look):
    return vlm.generate(**inputs(), prune=Prune(look=look), max_new_tokens=4, eos_token_id=None)


def test_all_blocks_chosen_is_the_ordinary_plan(vlm):
    plain, looked = ask(vlm, None), ask(vlm, ALL)
    np.testing.assert_array_equal(looked.tokens, plain.tokens)
    np.testing.assert_allclose(looked.first_logits, plain.first_logits, atol=2e-5)
    assert [look is not None for look in looked.looks] == [True, True, False, False] and all(view.all() for view in looked.viewed)


@pytest.mark.parametrize("number", range(2))
def test_second_look_equals_the_tower_with_other_blocks_hidden(vlm, number):
    """Learned positions are those of the whole picture, also where its last rows and columns are not seen."""
    engine, sample = vlm.engine, read_samples(vlm.config, **inputs())[number]
    seen = np.arange(len(sample.places)) % 3 == 0
    short = second_look(vlm.config, sample, seen)
    assert 0 < short.count < sample.count and not np.append(seen, False)[sample.windows].all()
    whole = vision_input([sample], vlm.config, 4, engine.vision_slots([sample]))
    hidden = np.append(~seen, False)[whole.patch_window] & (whole.patch_window >= 0)
    expected = engine.see(engine.split(dataclasses.replace(whole, patch_image=np.where(hidden, -1, whole.patch_image)), 4))
    found = engine.see(engine.split(vision_input([short], vlm.config, 4, engine.vision_slots([short])), 4))
    ours, theirs = short.slot_of_token, sample.slot_of_token[short.tokens]
    parts = [(one.tokens, *one.conditions, *one.deepstack) for one in (found, expected)]
    assert len(parts[0]) == 1 + 3 + 3
    for a, b in zip(*parts, strict=True):
        np.testing.assert_allclose(np.asarray(a)[0, ours], np.asarray(b)[0, theirs], atol=1e-4)


def test_the_traced_program_looks_as_the_engine_does(vlm):
    buckets = Ladders(
        patches=Ladder("patches", (512,)), prompt=Ladder("prompt", (112,)), kept=Ladder("kept", (112,)), batch=Ladder("batch", (4,))
    )
    infer = jax.jit(inference_fn(vlm.config, Prune(look=SOME), buckets, 4, glimpse=vlm.glimpse_config, eos_token_id=None))
    out = infer(inference_params(vlm.model), vlm.inference_inputs(inputs=inputs(), prune=Prune(look=SOME), buckets=buckets))
    done = ask(vlm, SOME)
    np.testing.assert_array_equal(out["tokens"], done.tokens)
    np.testing.assert_allclose(out["first_logits"], done.first_logits, atol=2e-5)
    for b, viewed in enumerate(done.viewed):
        np.testing.assert_array_equal(np.asarray(out["seen"])[b, : viewed.size], viewed)
    assert [bool(view.all()) for view in done.viewed] == [False, False, True, True]
