"""What the bundled model has never seen is told apart from scenes."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gp_jax.pretrained.files import BUNDLED
from gp_jax.scenes.draw import draw
from gp_jax.scenes.familiar import doubt, like_a_scene, strange_words
from gp_jax.scenes.source import ScenesSource, scene_question

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def tokens():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BUNDLED["scenes"] / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("split", ["train", "test", "test_ood"])
def test_scenes_are_familiar(tokens, split):
    for number in range(1000, 1030):
        picture = Image.fromarray(draw(scene_question(split, number, 0)[0]))
        question = ScenesSource(split, 1, number)[0].question
        assert doubt([picture], question, tokens) is None, question


def test_words_that_no_scene_has(tokens):
    assert strange_words("Who wrote Faust?", tokens) == ["Who", "wrote", "Faust"]
    assert strange_words("what is the COLOR of the Cross?", tokens) == []
    assert strange_words("describe the cat", tokens) == ["cat"]


def test_pictures_that_are_no_scenes(tokens):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (200, 300, 3), np.uint8))
    halves = Image.new("RGB", (300, 200), "navy")
    ImageDraw.Draw(halves).rectangle((0, 0, 300, 99), fill="khaki")
    ImageDraw.Draw(halves).rectangle((80, 60, 200, 150), fill="red")
    assert not like_a_scene(noise) and not like_a_scene(halves)
    said = doubt([noise], "Who wrote Faust?", tokens)
    assert said is not None and "\n" not in said
    assert "looks unlike one and it has never seen the words Who, wrote, Faust" in said


def test_photographs_are_no_scenes(shared):
    photos = [path for path in (shared / "photos").iterdir() if path.suffix in (".png", ".jpg", ".webp")]
    assert photos and not any(like_a_scene(Image.open(path)) for path in photos)
