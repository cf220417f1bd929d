"""Which chat template LLaVA's prompts come from, vicuna_v1 in conversations, and the longest pictures of LLaVA-NeXT."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_llava as tiny

from gp_jax import GlimpseError
from gp_jax.data.masks import evidence, inside
from gp_jax.data.record import Record
from gp_jax.pretrained.hf_config import model_config, read_config
from gp_jax.processing.llava import LlavaProcessor, vicuna_v1

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save_hf(tmp_path_factory.mktemp("model"), tiny.hf_model(following=True))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy without templates or weights."""
    for path in saved.glob("*.json"):
        if path.name != "chat_template.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder) -> LlavaProcessor:
    return LlavaProcessor.load(folder, model_config(read_config(folder)))


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{% if %}", "{{ messages[7].content }}"])
def test_a_template_that_fails_is_named(folder, template):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(GlimpseError, match="chat_template.json: the chat template fails") as error:
        load(folder).chat(1, "Who?")
    assert "\n" not in str(error.value)


def test_without_a_template_only_a_vicuna_has_its_prompt(folder):
    processor = load(folder)
    assert processor.chat(1, "Who?").endswith("USER: <image>\nWho? ASSISTANT:")
    shared = replace(processor.config, text=replace(processor.config.text, num_key_value_heads=2))  # as in Mistral and Yi
    with pytest.raises(GlimpseError, match="this model folder has no chat template and its decoder is no Vicuna"):
        type(processor)(shared, processor.tokenizer, processor.image_processor).chat(1, "Who?")


def test_vicuna_v1_of_a_conversation():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And where?"},
    ]
    assert vicuna_v1(turns) == "Be brief. USER: <image>\n<image>\nWho? ASSISTANT: A cat.</s>USER: And where? ASSISTANT:"


def test_pictures_so_long_that_nothing_of_the_detail_is_left(folder):
    """2000 x 10 pixels: less than half a row of the detail's visual tokens."""
    processor, size = load(folder), (2000, 10)
    overview, detail = processor.plot(*size).grids
    assert overview == (4, 4) and detail[0] * detail[1] == 0
    assert inside((0.0, 0.0, 1.0, 1.0), size, processor.areas(*size)[1]) is None
    picture = tiny.photo(*size)
    masks = evidence(Record("r:1", "d", "Who?", "red", (b"",), (((0.0, 0.0, 0.5, 1.0),),), (None,)), [size], processor)
    assert [mask.shape for mask in masks] == [overview, detail]
    np.testing.assert_array_equal(masks[0], np.tile([True, True, True, False], (4, 1)))
    assert len(processor([[picture]], ["Who?"]).images[0]) == 2
