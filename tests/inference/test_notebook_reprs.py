"""Models and results in a notebook: short reprs, and an answer with its picture."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gp_jax.inference.notebook import describe
from gp_jax.inference.results import Answer, Generation

pytestmark = pytest.mark.quick

TIMINGS = {"processing": 0.25, "compile": 9.0, "vision": 0.5}


def answer(text: str = "striped <b>white", **changes) -> Answer:
    keep = np.zeros((4, 4), bool)
    keep[0, 0] = True
    values = dict(text=text, tokens=np.zeros(3), kept=1, total=16, keep=[keep], images=[Image.new("RGB", (64, 64), "red")], timings=TIMINGS)
    return Answer(**values | changes)


def test_an_answer_shows_its_picture_and_numbers():
    assert repr(answer()) == "Answer('striped <b>white', 1 of 16 visual tokens kept, 0.75 s)"
    assert len(repr(answer("word " * 999))) < 200
    html = answer()._repr_html_()
    assert "striped &lt;b&gt;white" in html and "data:image/jpeg;base64," in html and "1 of 16 kept (6.2%)" in html
    assert "processing 0.250, vision 0.500" in html and "9.0 s more" in html
    later = answer(timings=TIMINGS | {"compile": 0.0}, images=[], keep=[])._repr_html_()
    assert "first call" not in later and "<img" not in later


def test_a_generation_is_short():
    done = Generation(np.zeros((2, 5)), [np.ones(4, bool), np.zeros(4, bool)], None, *[np.zeros(1)] * 8)
    assert repr(done) == "Generation(2 x 5 tokens, 4 of 8 visual tokens kept)"


def test_a_model_is_one_line():
    text, glimpse = SimpleNamespace(num_hidden_layers=8), SimpleNamespace(reduce_layer=4)
    model = SimpleNamespace(decoder=SimpleNamespace(embed_tokens=SimpleNamespace(dtype="float32")))
    config = SimpleNamespace(text=text, family=SimpleNamespace(title="Qwen2.5-VL"))
    vlm = SimpleNamespace(config=config, glimpse_config=glimpse, model=model, name="scenes", folder=None)
    assert describe(vlm) == "GlimpseVLM('scenes', Qwen2.5-VL, glimpse after layer 4 of 8, float32)"
    vlm.glimpse_config = None
    assert describe(vlm) == "GlimpseVLM('scenes', Qwen2.5-VL, 8 layers, float32)"
