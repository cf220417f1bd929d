"""Named rewards of one completion. A GlimpseError that one raises means that the reward is missing, e.g. without a usable reference."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gp_jax.data.record import Box
from gp_jax.errors import GlimpseError
from gp_jax.evaluation.metrics import anls, exact_match, token_f1, vqa_accuracy

JUDGE = "judge"  # the reward that a language model gives


@dataclass(frozen=True)
class Completion:
    """One completion to be rewarded. answer: one reference or several; tokens: without padding; cut: whether it reached the token limit;
    source: number of its data source; boxes: evidence as shares of the picture; size: width and height in pixels of the picture that the
    model saw, for box_iou."""

    question: str
    answer: str | tuple[str, ...]
    text: str
    tokens: tuple[int, ...] = ()
    cut: bool = False
    limit: int = 0
    source: int = 0
    id: str = ""
    dataset: str = ""
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """The references, at least one. Raises: GlimpseError when there is none."""
        found = (self.answer,) if isinstance(self.answer, str) else tuple(self.answer)
        if not found:
            raise GlimpseError("no reference answer")
        return found


def precision_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if answer and a reference are equal in lower case without spaces around them, as in the released training; else 0.0."""
    return float(prediction.strip().lower() in {reference.strip().lower() for reference in references})


# A letter in bold, in brackets or in quotes. Small letters count only where the text after them cannot go on with "a" as an article.
OPEN, CLOSE = r"[*_(\[{\"'`$\s]{0,8}", r"[*_)\]}\"'`$]{0,8}"
LETTER = rf"{OPEN}(?:([A-Z])(?![A-Za-z0-9'])|([a-z])(?=\s{{0,8}}(?:[).,:;!*_\]}}\"'`$\n]|\Z))(?!'[a-z]))"
NAMED = r"\b(?i:answer|choice|option|letter)"
IS = r"(?:\s{1,8}(?i:is|should\s{1,8}be|would\s{1,8}be)\s{0,8}:?|[*_]{0,4}\s{0,8}[:=])"
CHOICES = tuple(
    map(
        re.compile,
        (
            rf"\A{OPEN}([A-Za-z]){CLOSE}[.:,;!]?{CLOSE}\s{{0,8}}\Z",  # nothing but a letter
            rf"{NAMED}{IS}\s{{0,8}}(?:(?i:option|choice|letter)\s{{1,8}})?{LETTER}",  # the answer is C; Answer: B
            rf"\b(?i:option|choice)\s{{1,8}}{LETTER}",  # option B
            r"\A\s{0,8}[*_]{0,4}(?:\(([A-Za-z])\)|([A-Za-z])[*_]{0,4}[).:](?=[*_]{0,4}(?:\s|\Z)))",  # (a) red; B. blue
            r"\(([A-Z])\)|\[([A-Z])\]",
        ),
    )
)
LONE = re.compile(r"(?<![\w'])(?:A(?!\s{1,8}[a-z])|[B-HJ-Z])(?![\w'])")  # not the words A and I
LONGEST = 20_000  # characters of a completion that are looked at


def find_choice(text: str) -> str | None:
    """The letter of a single choice, in upper case. None if there is none, or several that nothing sets apart.

    Patterns in this order, the first hit counts: nothing but a letter ("A", "(a)", "a."); "the answer is C" or "Answer: B"; "option B";
    a letter that begins the text ("B. blue"); a letter in brackets; a capital letter, if all of them are the same.
    """
    text = text[:LONGEST]
    for pattern in CHOICES:
        if found := pattern.search(text):
            return next(letter for letter in found.groups() if letter).upper()
    lone = set(LONE.findall(text))
    return lone.pop() if len(lone) == 1 else None


def choice_letter(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the answer's choice, `find_choice`, is that of a reference; else 0.0. Raises: GlimpseError when no reference has one."""
    letters = {letter for letter in map(find_choice, references) if letter}
    if not letters:
        raise GlimpseError("the reference names no choice letter")
    return float(find_choice(prediction) in letters)


NUMBER = r"\s{0,8}(-?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}))\s{0,8}"
BOX = re.compile(r"\[" + ",".join([NUMBER] * 4) + r"\]")


def find_boxes(text: str) -> list[Box]:
    """All `[x1, y1, x2, y2]` in a text."""
    boxes = []
    for found in BOX.finditer(text[:LONGEST]):
        x1, y1, x2, y2 = map(float, found.groups())
        boxes.append((x1, y1, x2, y2))
    return boxes


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes in the same units, 0..1; 0.0 where one has no area."""
    both = _area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))
    return both / (_area(one) + _area(other) - both) if both else 0.0


def box_iou(completion: Completion) -> float:
    """IoU of the completion's box and the reference's, 0..1; the best of several references counts.

    The completion must hold exactly one `[x1, y1, x2, y2]`: none, or several to choose from, give 0.0. References are those answers that
    hold exactly one box, in the same units; if none does, the record's boxes. Those are shares of the picture, so the completion's numbers
    are taken as shares if all are at most 1, else as pixels of `size`. Raises: GlimpseError without a reference box of some area, or
    when `size` is needed and not known.
    """
    written = [boxes[0] for boxes in map(find_boxes, completion.answers) if len(boxes) == 1]
    references = [box for box in written or completion.boxes if _area(box) > 0]
    if not references:
        raise GlimpseError("the reference has no box")
    said = find_boxes(completion.text)
    if len(said) != 1:
        return 0.0
    box = said[0]
    if not written and max(box) > 1:
        if completion.size is None:
            raise GlimpseError("the size of the picture, to which the box refers, is not known")
        width, height = completion.size
        box = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    return max(iou(box, reference) for reference in references)


def length_penalty(completion: Completion, free: float) -> float:
    """0.0 for up to `free` * limit tokens, from there linearly down to -1.0 at the limit and for completions that were cut: the soft
    overlong punishment of DAPO (arXiv 2503.14476). free: 0..1, below 1. Raises: GlimpseError without a limit."""
    if completion.limit < 1:
        raise GlimpseError("the token limit is not known")
    over = (len(completion.tokens) / completion.limit - free) / (1 - free)
    return -1.0 if completion.cut else 0.0 - min(1.0, max(0.0, over))


def _text(metric: Callable[[str, Sequence[str]], float]) -> Callable[[Completion, float], float]:
    return lambda completion, free: metric(completion.text, completion.answers)


# Rewards of a completion, given `RewardConfig.length_free` too. JUDGE, and the functions of users, are asked for many at once.
REWARDS: dict[str, Callable[[Completion, float], float]] = {
    "exact_match": _text(exact_match),
    "vqa_accuracy": _text(vqa_accuracy),
    "anls": _text(anls),
    "token_f1": _text(token_f1),
    "precision_match": _text(precision_match),
    "choice_letter": _text(choice_letter),
    "box_iou": lambda completion, free: box_iou(completion),
    "length_penalty": length_penalty,
}
