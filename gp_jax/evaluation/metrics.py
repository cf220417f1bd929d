"""Metrics of one answer or one keep mask, each 0..1 per sample. Pure Python and numpy.

References are one string or several; with several the best match counts, except for VQA accuracy, which counts the references that agree.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gp_jax.errors import GlimpseError

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": 0,
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
}
CONTRACTED = ("ain't", "can't", "ma'am", "o'clock", "shan't", "'twas", "won't", "y'all")
ENDINGS = {
    "n't": "are could did does do had has have is might must need ought should was were would",
    "'ve": "could might must not should they we what where who would you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'d": "he how it someone something there they where who you",
    "'re": "there they what why you",
}
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

References = str | Sequence[str]


def _listed(references: References) -> list[str]:
    found = [references] if isinstance(references, str) else list(references)
    if not found:
        raise GlimpseError("a metric needs at least one reference answer")
    return found


# Answers --------------------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, single spaces between words, none around them, no trailing period (one is removed), Unicode NFC."""
    text = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return text.removesuffix(".").rstrip()


def exact_match(prediction: str, references: References) -> float:
    """1.0 if answer and a reference are equal after `normalise`, else 0.0. Articles and other punctuation must match."""
    return float(normalise(prediction) in {normalise(reference) for reference in _listed(references)})


def _contractions() -> dict[str, str]:
    """Spelling with a missing apostrophe -> correct spelling, for the contractions in VQA's evaluation."""
    table = {word.replace("'", ""): word for word in CONTRACTED}
    for ending, words in ENDINGS.items():
        table |= {word + ending.replace("'", ""): word + ending for word in words.split()}
    for first, words in {
        "n't": "could had might should would",
        "'d": "he it she somebody someone something there they we who y'all you",
    }.items():
        for word in words.split():
            whole = f"{word}{first}'ve"
            table |= {word + first.replace("'", "") + "'ve": whole, word + first + "ve": whole}
    return table


CONTRACTIONS = _contractions()


def vqa_normalise(text: str) -> str:
    """The answer processing of VQA's evaluation: punctuation, lower case, number words, articles, contractions.

    Punctuation beside a space is removed, between letters it becomes a space; with a comma between digits all punctuation is removed. A
    period before a digit stays. If nothing would remain ("A" of a multiple choice), the text is returned in lower case.
    """
    plain = " ".join(text.split())
    out, numeric = plain, re.search(r"\d,\d", plain)
    for mark in VQA_PUNCTUATION:
        out = out.replace(mark, "" if numeric or f"{mark} " in plain or f" {mark}" in plain else " ")
    words = [str(NUMBERS.get(word, word)) for word in re.sub(r"\.(?!\d)", "", out).lower().split()]
    words = [CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(words) or plain.lower()


def vqa_accuracy(prediction: str, references: References) -> float:
    """VQA accuracy: min(1, matches / 3), averaged over all subsets that leave one reference out (Antol et al. 2015; VQA v2: Goyal et al.
    2017). Both sides go through `vqa_normalise`.

    VQA has ten references. With one it is 1 or 0; with two or three, all of the others must agree for a 1 (ours: matches / (n - 1)).
    """
    said, given = vqa_normalise(prediction), [vqa_normalise(reference) for reference in _listed(references)]
    if len(given) == 1:
        return float(said == given[0])
    matches = sum(reference == said for reference in given)
    needed = min(3, len(given) - 1)
    return sum(min(1.0, (matches - (reference == said)) / needed) for reference in given) / len(given)


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: number of insertions, deletions and substitutions of characters."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def anls(prediction: str, references: References, threshold: float = 0.5) -> float:
    """Average Normalised Levenshtein Similarity of one answer: 1 - NL where NL < threshold, else 0; the best reference counts.

    NL is the edit distance over the longer length, in lower case with single spaces (ST-VQA: Biten et al. 2019, formula 1; DocVQA:
    Mathew et al. 2021).
    """
    said, best = " ".join(prediction.lower().split()), 0.0
    for reference in _listed(references):
        given = " ".join(reference.lower().split())
        longest = max(len(said), len(given), 1)
        if abs(len(said) - len(given)) / longest >= threshold:  # a lower bound of the distance
            continue
        distance = edit_distance(said, given) / longest
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def _words(text: str) -> list[str]:
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in text.split() if word not in ARTICLES]


def token_f1(prediction: str, references: References) -> float:
    """F1 of the bags of words, without case, ASCII punctuation and articles (SQuAD: Rajpurkar et al. 2016); the best reference counts.

    Where either side has no words it is 1.0 if both have none (SQuAD 2.0).
    """
    said, best = _words(prediction), 0.0
    for reference in _listed(references):
        given = _words(reference)
        if not said or not given:
            best = max(best, float(said == given))
            continue
        common = (Counter(said) & Counter(given)).total()
        best = max(best, 2 * common / (len(said) + len(given)))
    return best


# Evidence -------------------------------------------------------------------------------------------------------------------


def _overlap(keep: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    """Numbers of tokens: in both, kept, in the reference."""
    keep, reference = np.asarray(keep, bool), np.asarray(reference, bool)
    if keep.shape != reference.shape:
        raise GlimpseError(f"a keep mask of shape {keep.shape} does not fit a reference of shape {reference.shape}")
    return int((keep & reference).sum()), int(keep.sum()), int(reference.sum())


def recall(keep: np.ndarray, reference: np.ndarray) -> float:
    """Share of the evidence's tokens that were kept. Args: bool masks of equal shape. NaN (left out of means) without evidence."""
    both, _, evidence = _overlap(keep, reference)
    return both / evidence if evidence else float("nan")


def precision(keep: np.ndarray, reference: np.ndarray) -> float:
    """Share of the kept tokens that are evidence; 0.0 if nothing was kept. NaN without evidence."""
    both, kept, evidence = _overlap(keep, reference)
    return both / max(kept, 1) if evidence else float("nan")


def iou(keep: np.ndarray, reference: np.ndarray) -> float:
    """Intersection over union (Jaccard 1912) of kept tokens and evidence. NaN without evidence."""
    both, kept, evidence = _overlap(keep, reference)
    return both / (kept + evidence - both) if evidence else float("nan")
