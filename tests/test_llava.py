"""LLaVA-1.5 and LLaVA-NeXT against transformers in torch, and what must not change an answer."""

import jax
import numpy as np
import pytest
import tiny_llava as tiny
import torch
from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from gp_jax import GlimpseError, GlimpseVLM, Prune, make_mesh
from gp_jax.runtime.clock import COMPILES

SIZES = [(90, 60), (50, 130), (64, 64), (200, 41)]
QUESTIONS = ["What is it?", "Why so long a question about this?", "Who?"]


@pytest.fixture(scope="module", params=[False, True], ids=["llava", "llava_next"])
def pair(request, tmp_path_factory):
    """The same weights in torch and here, a glimpse here, and transformers' processor."""
    following, folder = request.param, tmp_path_factory.mktemp("model")
    model = tiny.hf_model(following, **({"num_key_value_heads": 2} if following else {}))
    tiny.save_hf(folder, model)
    glimpse = tiny.save_glimpse(folder / "glimpse")
    vlm = GlimpseVLM.from_pretrained(folder, glimpse=glimpse, ladders=tiny.LADDERS)
    processor, images = (LlavaNextProcessor, LlavaNextImageProcessorPil) if following else (LlavaProcessor, LlavaImageProcessorPil)
    points = {"image_grid_pinpoints": tiny.PINPOINTS} if following else {}
    options = dict(patch_size=tiny.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    theirs = processor(
        images(**tiny.clip_settings(**points)), AutoTokenizer.from_pretrained(folder), chat_template=tiny.TEMPLATE, **options
    )
    return model, vlm, theirs


def prepared_by_transformers(processor, images, question: str) -> dict:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=images or None, text=text, return_tensors="np")


def test_processor_logits_and_tokens_equal_transformers(pair):
    model, vlm, processor = pair
    for number, (size, question) in enumerate([*zip(SIZES, QUESTIONS * 2, strict=False), (None, "No picture?")]):
        images = [tiny.photo(*size, seed=number)] if size else []
        theirs = prepared_by_transformers(processor, images, question)
        ours = vlm.processor([images], [question]).inputs
        np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
        for name in {"pixel_values", "image_sizes"} & theirs.keys():
            np.testing.assert_array_equal(ours[name], theirs[name])
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in theirs.items() if name != "token_type_ids"}
        with torch.no_grad():
            logits = model(**tensors).logits[:, -1]
            told = model.generate(**tensors, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=tiny.PAD)
        done = vlm.generate(**ours, prune=None, max_new_tokens=8, eos_token_id=None)
        np.testing.assert_allclose(done.first_logits, logits, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(done.tokens, told[:, theirs["input_ids"].shape[1] :])


def mixed(vlm):
    """A picture, two pictures, none."""
    own = [[tiny.photo(*SIZES[0])], [tiny.photo(*SIZES[1], seed=1), tiny.photo(*SIZES[2], seed=2)], []]
    return own, vlm.processor(own, QUESTIONS).inputs


@pytest.mark.parametrize("prune", [None, Prune(fixed_remain_ratio=0.3)], ids=["dense", "glimpse"])
def test_batch_equals_its_samples_and_eight_devices_equal_one(pair, prune):
    _, vlm, _ = pair
    own, inputs = mixed(vlm)
    together = vlm.generate(**inputs, prune=prune, max_new_tokens=8, eos_token_id=None)
    for b, (images, question) in enumerate(zip(own, QUESTIONS, strict=True)):
        alone = vlm.generate(**vlm.processor([images], [question]).inputs, prune=prune, max_new_tokens=8, eos_token_id=None)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])
        np.testing.assert_array_equal(alone.keep[0], together.keep[b])
    if prune:
        assert [int(keep.sum()) for keep in together.keep] == [int(0.3 * keep.size) for keep in together.keep]
    if jax.device_count() == 8 and prune:
        folder = vlm.folder
        mesh = make_mesh(2, 2, 2)
        sharded = GlimpseVLM.from_pretrained(folder, glimpse=folder / "glimpse", ladders=tiny.LADDERS, mesh=mesh)
        spread = sharded.generate(**inputs, prune=prune, max_new_tokens=8, eos_token_id=None)
        np.testing.assert_array_equal(spread.tokens, together.tokens)
        np.testing.assert_allclose(spread.first_logits, together.first_logits, atol=1e-4)


def test_keeping_everything_is_dense_and_a_mask_is_kept_as_it_is(pair):
    _, vlm, _ = pair
    _, inputs = mixed(vlm)
    dense = vlm.generate(**inputs, prune=None, max_new_tokens=4, eos_token_id=None)
    whole = vlm.generate(**inputs, prune=Prune(reduce_threshold=-1.0), max_new_tokens=4, eos_token_id=None)
    np.testing.assert_array_equal(dense.tokens, whole.tokens)
    np.testing.assert_allclose(dense.first_logits, whole.first_logits, atol=1e-4)
    masks = [np.random.default_rng(b).random(keep.size) < 0.5 for b, keep in enumerate(dense.keep)]
    given = vlm.generate(**inputs, prune=Prune(reference_masks=masks), max_new_tokens=1)
    for mask, keep in zip(masks, given.keep, strict=True):
        np.testing.assert_array_equal(mask, keep)


METHODS = ("attention", "random", "fastv", "visionzip", "divprune", "cdpruner", "vscan")


def test_published_methods_run(pair):
    _, vlm, _ = pair
    _, inputs = mixed(vlm)
    for method in METHODS[:: 2 if vlm.config.vision.pinpoints else 1]:
        done = vlm.generate(**inputs, prune=Prune(method=method, fixed_remain_ratio=0.25), max_new_tokens=2)
        assert all(keep.sum() == int(0.25 * keep.size) for keep in done.keep), method


def test_answer_shows_what_the_grids_cover_and_nothing_compiles_twice(pair):
    _, vlm, _ = pair
    images = [tiny.photo(90, 60), tiny.photo(50, 130)]
    vlm.warm_up(prune=Prune(), batch=1)
    before = COMPILES.count
    answer = vlm.answer(images[0], "What is it?", max_new_tokens=2, prune=Prune(fixed_remain_ratio=0.3))
    again = vlm.answer(images[1], "And what may that be?", max_new_tokens=3, prune=Prune(fixed_remain_ratio=0.5))
    assert COMPILES.count == before
    for made in (answer, again):
        assert len(made.images) == len(made.keep) == (2 if vlm.config.vision.pinpoints else 1)
        assert made.overlay() is not None and made.total == sum(keep.size for keep in made.keep)
    maps = vlm.glimpse(images[0], "What is it?")
    assert [m.shape for m in maps] == [keep.shape for keep in answer.keep]


def test_saved_models_load_here_and_in_transformers(pair, tmp_path):
    model, vlm, _ = pair
    vlm.save_pretrained(tmp_path / "saved")
    again, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    loaded = GlimpseVLM.from_pretrained(tmp_path / "saved", ladders=tiny.LADDERS)
    assert loaded.glimpse_config == vlm.glimpse_config and loaded.config == vlm.config
    assert loaded.processor.chat(1, "Who?") == vlm.processor.chat(1, "Who?")


BAD = {
    "image_grid_thw is not an input of this model": dict(image_grid_thw=np.array([[1, 4, 4]])),
    "pixel_values must be": dict(pixel_values=np.zeros((1, 3, 20, 20), np.float32)),
    "not finite": dict(pixel_values=None),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_inputs_name_the_argument(pair, message):
    _, vlm, _ = pair
    inputs = vlm.processor([[tiny.photo(60, 60)]], ["Who?"]).inputs
    change = BAD[message]
    if change.get("pixel_values", 0) is None:
        change = {"pixel_values": np.full_like(inputs["pixel_values"], np.nan)}
    with pytest.raises(GlimpseError, match=message):
        vlm.generate(**(inputs | change), max_new_tokens=1)
