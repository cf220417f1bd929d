"""The judge's prompt, the scores in its verdicts, and the file that stores verdicts."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gp_jax.errors import printable
from gp_jax.evaluation.jsonl import read_lines
from gp_jax.evaluation.redaction import bare_url
from gp_jax.evaluation.settings import JudgeConfig
from gp_jax.runtime.disk import parse_json

# The prompt of the released evaluation, word for word.
SYSTEM = """
You are responsible for proofreading the answers, you need to give a score to the model's answer by referring to the standard answer, \
based on the given question. The full score is 1 point and the minimum score is 0 points. Please output the score in the form \
"score: <score>". The evaluation criteria require that the closer the model's answer is to the standard answer, the higher the score.
"""
PROMPT = """
question: {}
standard answer: {}
model's answer: {}
"""
NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
RANGE = r"[(\[]\s*(?:(?:from\s+)?0(?:\.0)?\s*(?:[-\u2013]|to)\s*1(?:\.0)?|(?:out\s+)?of\s+1(?:\.0)?)\s*[)\]]"
# The word score, optionally the scale in brackets, as in the prompt, then the number. No end of a sentence in between.
SCORE = re.compile(rf"\bscore\b[*_\"' ]{{0,4}}(?:{RANGE})?[^\w.,;!?]{{0,10}}?({NUMBER})", re.IGNORECASE)
# Text after a number with which the number is no score: more digits or letters, a range or a product, a percentage.
MORE = re.compile(
    r"[.,]\d|[^\W_]|[^\S\n]*[-\u2013\u2014\u2212~\u00d7x*^][^\S\n]*[.\d]|[^\S\n]*(?:to|or|and|through)[^\S\n]+[.\d]|[^\S\n]*(?:%|percent\b)",
    re.IGNORECASE,
)
# Text after a number that names its scale; the group matches if the scale ends at 1.
SCALE = re.compile(
    r"[\s,*_)\]}>\"']*[(\[]?\s*(?:/|(?:out\s+)?of\b|on\s+an?\s+(?:\S+\s+)?scale\b)"
    r"(\s*(?:of\s+|from\s+)?(?:0\s*(?:to|[-\u2013])\s*)?1(?:\.0+)?(?![\w%]|[.,]\d))?",
    re.IGNORECASE,
)

LONGEST = 1 << 16  # characters of a verdict

Question = tuple[str, str, str]  # question, standard answer, model's answer


@dataclass
class Verdicts:
    """Scores of questions. failures: the reason per question without a score; unserved: those of them that another request may settle, and
    whether the question itself may be why (else only the server is); asked, cached: numbers of distinct questions."""

    scores: dict[Question, float] = field(default_factory=dict)
    failures: dict[Question, str] = field(default_factory=dict)
    unserved: dict[Question, bool] = field(default_factory=dict)
    asked: int = 0
    cached: int = 0

    def text(self) -> str:
        """Describes the verdicts in one line."""
        reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(self.failures.values()).most_common(4))
        left = f"; {len(self.failures)} left out: {reasons}" if self.failures else ""
        return f"{len(self.scores)} answers scored ({self.cached} known before){left}"


def read_score(verdict: str) -> float | None:
    """The score in a verdict, 0..1. None if there is no score, if several disagree, if the scale is another one, or if the number is
    ambiguous (a range, a decimal comma): such verdicts are reported, never guessed."""
    if len(verdict) > LONGEST:
        return None
    verdict = re.sub(r"\s+", lambda space: "\n" if "\n" in space[0] else " ", verdict)  # keeps SCALE from backtracking over long spaces
    found = {_number(verdict, match) for match in SCORE.finditer(verdict)}
    if not found and re.fullmatch(r"\s*(?:0|1|[01]?\.\d+|[01]\.)\s*", verdict):
        found = {float(verdict)}
    score = found.pop() if len(found) == 1 else None
    return score if score is not None and 0 <= score <= 1 else None


def _number(verdict: str, match: re.Match) -> float | None:
    """The number at the end of a match; None if the text after it shows that it is no score, or a scale other than 0..1."""
    scale = SCALE.match(verdict, match.end())
    if MORE.match(verdict, match.end()) or (scale and scale.group(1) is None):
        return None
    return float(match.group(1))


def request(config: JudgeConfig, question: Question) -> dict:
    """The body of a chat-completion request."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT.format(*question)}]
    return {"model": config.model, "messages": messages, "temperature": 0, "seed": config.seed, "max_tokens": config.max_tokens}


def digest(config: JudgeConfig, question: Question) -> str:
    """A digest of everything that a verdict may depend on."""
    asked = {"url": bare_url(config.url).rstrip("/")} | request(config, question)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_cache(path: Path) -> dict[str, float]:
    """Scores of stored verdicts: digest of the question -> score, read with `read_score` anew.

    Damaged lines are reported, and their questions will be asked again. Raises: GlimpseError when the file cannot be read.
    """
    found: dict[str, float] = {}
    damaged = 0
    for _, line in read_lines(path):
        try:
            fields = parse_json(line.decode("utf-8"), path)
            key = fields["key"]
            score: Any = read_score(fields["verdict"]) if "verdict" in fields else fields["score"]
            unread = "verdict" in fields and score is None
            if not isinstance(key, str) or not (unread or (type(score) in (int, float) and 0 <= score <= 1)):
                raise ValueError("no key or no score")
        except (ValueError, TypeError, KeyError):
            damaged += 1
        else:
            found |= {} if unread else {key: float(score)}
    if damaged:
        print(printable(f"{path}: damaged lines, not used: {damaged}"))
    return found
