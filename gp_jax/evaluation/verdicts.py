"""What a judge is asked, what its verdicts say, and the file that keeps them."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gp_jax.evaluation.settings import JudgeConfig

# The prompt of the released evaluation, word by word.
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
SCORE = re.compile(r"score\W{0,6}?(-?\d+(?:\.\d+)?|-?\.\d+)(?![\d.]*\d|\s*%)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?", re.IGNORECASE)

Question = tuple[str, str, str]  # question, standard answer, model's answer


@dataclass
class Verdicts:
    """scores: per question that has one; failures: why, for the others. asked, cached: distinct questions."""

    scores: dict[Question, float] = field(default_factory=dict)
    failures: dict[Question, str] = field(default_factory=dict)
    asked: int = 0
    cached: int = 0

    def text(self) -> str:
        """One line."""
        reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(self.failures.values()).most_common(4))
        left = f"; {len(self.failures)} left out: {reasons}" if self.failures else ""
        return f"{len(self.scores)} answers scored ({self.cached} known before){left}"


def read_score(verdict: str) -> float | None:
    """The score in a verdict, 0..1; None when there is none, or several that disagree, or one on another scale."""
    found = {(float(score), float(scale) if scale else 1.0) for score, scale in SCORE.findall(verdict)}
    if not found and re.fullmatch(r"\s*(?:0|1|[01]?\.\d+|[01]\.)\s*", verdict):
        found = {(float(verdict), 1.0)}
    if len(found) != 1:
        return None
    score, scale = found.pop()
    return score if scale == 1 and 0 <= score <= 1 else None


def request(config: JudgeConfig, question: Question) -> dict:
    """The body of a chat completion."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT.format(*question)}]
    return {"model": config.model, "messages": messages, "temperature": 0, "seed": config.seed, "max_tokens": config.max_tokens}


def digest(config: JudgeConfig, question: Question) -> str:
    """Of everything that a verdict may depend on."""
    asked = {"url": config.url.rstrip("/")} | request(config, question)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_cache(path: Path) -> dict[str, float]:
    """Lines that can be read; one that a killed run left half-written is none of them."""
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            fields = json.loads(line)
            found[fields["key"]] = float(fields["score"])
        except (ValueError, TypeError, KeyError):
            continue
    return found
