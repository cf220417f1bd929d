"""Pictures and questions become what a Hugging Face processor returns."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gp_jax import GlimpseError, GlimpseVLM, Prune
from gp_jax.processing.prompts import MAX_TEXT
from gp_jax.processing.qwen import Processor
from gp_jax.tiny import PROCESSOR, make_checkpoint

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for h, w in ((90, 140), (61, 61), (30, 200))]


def test_equals_the_hugging_face_way(vlm, pictures):
    """Chat template, one placeholder per visual token, left padding, patches and grids."""
    own, questions = [pictures[:2], pictures[2:], []], ["What is new?", "Which one is it?", "Why?"]
    ours = vlm.processor(own, questions).inputs
    tokenizer, image_processor, merge = vlm.processor.tokenizer, vlm.processor.image_processor, 4
    texts, grids, pixels = [], [], []
    for images, question in zip(own, questions, strict=True):
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        for image in images:
            part = image_processor(images=[image], return_tensors="np")
            grids.append(part["image_grid_thw"])
            pixels.append(part["pixel_values"])
            text = text.replace("<|image_pad|>", "<|placeholder|>" * int(grids[-1].prod() // merge), 1)
        texts.append(text.replace("<|placeholder|>", "<|image_pad|>"))
    theirs = tokenizer(texts, padding=True, padding_side="left", return_tensors="np")
    np.testing.assert_array_equal(ours["attention_mask"], theirs["attention_mask"])
    mask = ours["attention_mask"].astype(bool)
    np.testing.assert_array_equal(ours["input_ids"][mask], theirs["input_ids"][mask])
    np.testing.assert_array_equal(ours["image_grid_thw"], np.concatenate(grids))
    np.testing.assert_array_equal(ours["pixel_values"], np.concatenate(pixels))


@pytest.mark.parametrize("size", [(40, 1), (1, 40), (1, 1), (200, 1), (1, 3), (3, 1)], ids=str)
def test_lines_of_one_pixel_are_resized_like_any_picture(vlm, size):
    """And none of their sides is taken for colours."""
    made = vlm.processor([[Image.new("RGB", size, (255, 0, 0))]], ["Why?"])
    (_, rows, columns), patches = made.inputs["image_grid_thw"][0], made.inputs["pixel_values"]
    assert (rows // 2, columns // 2) == made.grids[0][0] and len(patches) == rows * columns
    assert (np.ptp(patches.reshape(len(patches), 3, -1), axis=(0, 2)) == 0).all()
    assert len(np.unique(patches)) == 3, "red, green and blue have one value each"


def test_answer_equals_generate_on_the_processors_output(vlm, pictures):
    prune = Prune(fixed_remain_ratio=0.25)
    prepared = vlm.processor([pictures[:2]], ["What is new?"])
    done = vlm.generate(**prepared.inputs, prune=prune, max_new_tokens=6)
    answer = vlm.answer(pictures[:2], "What is new?", prune=prune, max_new_tokens=6)
    np.testing.assert_array_equal(answer.tokens, done.tokens[0])
    np.testing.assert_array_equal(np.concatenate([k.reshape(-1) for k in answer.keep]), done.keep[0])
    assert answer.total == done.keep[0].size and [k.shape for k in answer.keep] == list(prepared.grids[0])


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What is <|image_pad|> for?", "holds the image placeholder <|image_pad|>"),
        ("What is <|video_pad|> for?", "holds the video placeholder <|video_pad|>"),
        (" \n", "is empty"),
        ("half \ud83d", "is not valid text (it holds half of a surrogate pair)"),
        (5, "is of type int, not text"),
        (None, "is of type NoneType, not text"),
        ("x" * (MAX_TEXT + 1), "is longer than 512 KiB"),
        ("\u00e9" * (MAX_TEXT // 2 + 1), "is longer than 512 KiB"),
    ],
)
def test_refusal_says_what_the_processor_would_raise(vlm, pictures, question, reason):
    assert vlm.processor.refusal(question) == reason
    with pytest.raises(GlimpseError, match=re.escape(f"question 2 {reason}")):
        vlm.processor([pictures[:1]] * 2, ["What is new?", question])


def test_what_stands_for_a_picture_elsewhere_is_plain_text(vlm, pictures):
    question = "Where is <image> or <|im_start|>, with \0 in it?"
    assert vlm.processor.refusal(question) is None
    assert "<image>" in vlm.processor.text(vlm.processor([pictures[:1]], [question]).inputs["input_ids"][0])


def test_a_placeholder_in_the_system_message(vlm, pictures):
    with pytest.raises(GlimpseError, match="the system message holds the image placeholder"):
        vlm.processor([pictures[:1]], ["Who?"], system="You see <|image_pad|>.")


def test_tokens_beyond_the_vocabulary_are_refused(vlm):
    small = replace(vlm.config, text=replace(vlm.config.text, vocab_size=20))
    processor = Processor(small, vlm.processor.tokenizer, vlm.processor.image_processor)
    assert re.fullmatch("becomes token [0-9]+, which the model's vocabulary of 20 does not have", processor.refusal("What?"))


def test_processor_files_of_transformers_4_and_5(vlm, tmp_path):
    small = PROCESSOR | {"max_pixels": 28 * 28 * 6}
    for name, content in (("preprocessor_config.json", small), ("processor_config.json", {"image_processor": small})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        processor = Processor.load(folder, vlm.config)
        assert processor.tokenizer is None
        _, grid = processor.pixels([Image.new("RGB", (500, 400))])
        assert grid.prod() // 4 <= 6, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 16}, r"does not fit the model: patch_size=16 \(model: 14\)"),
        ({"min_pixels": "abc"}, "min_pixels=.abc.: must be a whole number"),
    ],
)
def test_bad_processor_files(vlm, tmp_path, change, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | change))
    with pytest.raises(GlimpseError, match=f"preprocessor_config.json: {message}"):
        Processor.load(tmp_path, vlm.config)


def test_without_tokenizer_or_template(vlm, pictures, tmp_path):
    bare = Processor(vlm.config, None, vlm.processor.image_processor)
    with pytest.raises(GlimpseError, match="no tokenizer files: use generate"):
        bare([pictures[:1]], ["What?"])
    make_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(GlimpseError, match="no chat template"):
        GlimpseVLM.from_pretrained(tmp_path).answer(pictures[0], "What?")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(GlimpseError, match="tokenizer.json: is not valid JSON"):
        GlimpseVLM.from_pretrained(tmp_path)
