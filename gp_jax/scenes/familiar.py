"""Is a question, or a picture, of the kind that the bundled model was trained on? About anything else it answers fluent nonsense."""

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gp_jax.errors import some
from gp_jax.pretrained.files import BUNDLED

WORD = re.compile(r"[^\W\d_]+")
# A scene has a background of one grey tone: of 750 scenes the least had 59 % of its pixels this near to its median color, of eight
# photographs of people, food, streets and animals the most had 41 %.
NEAR, SHARE = 40, 0.5  # of 255 per channel; share of the pixels
GRID = 96  # pixels across at which a picture is looked at


def strange_words(question: str, tokens: Callable[[str], int]) -> list[str]:
    """The words of a question that no scene's question has. tokens: counts those of a text; every word of the training is a single one."""
    found = dict.fromkeys(WORD.findall(question))
    return [word for word in found if min(tokens(form + word.lower()) for form in ("", " ")) > 1 and tokens(f" {word}") > 1]


def like_a_scene(picture: Image.Image) -> bool:
    """Whether a picture has the even background of a scene."""
    small = picture.convert("RGB").resize((GRID, GRID), Image.Resampling.NEAREST)
    pixels = np.asarray(small, np.int16).reshape(-1, 3)
    return bool((np.abs(pixels - np.median(pixels, axis=0)).max(axis=1) <= NEAR).mean() >= SHARE)


def doubt(pictures: Sequence[Image.Image], question: str, tokens: Callable[[str], int]) -> str | None:
    """A warning, one line, for what the bundled model cannot know; None for a question about a scene."""
    why = []
    if not all(map(like_a_scene, pictures)):
        why.append("this picture looks unlike one" if len(pictures) == 1 else "not all of these pictures look like one")
    if words := strange_words(question, tokens):
        why.append(f"it has never seen the word{'s' * (len(words) > 1)} {some(words)}")
    if not why:
        return None
    return f"the bundled model 'scenes' knows generated scenes only, and {' and '.join(why)}: its answer means nothing"


def warn_of_strange(
    folder: Path | None, pictures: Sequence[Sequence[Image.Image]], questions: str | Sequence[str], tokenize: Callable[..., list[list[int]]]
) -> None:
    """Warns, once in a process, about each question that `doubt` has something to say about. Only the bundled model is doubted.

    Args: folder: of the model; pictures: per question; tokenize: of its `Processor`.
    """
    if folder not in BUNDLED.values():
        return
    for own, question in zip(pictures, [questions] if isinstance(questions, str) else questions, strict=True):
        if said := doubt(own, question, lambda text: len(tokenize([text], prompts=False)[0])):
            warnings.warn(said, stacklevel=3)
