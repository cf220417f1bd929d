"""The judge of a training run: an outage of its server costs waiting, never a reward."""

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from gp_jax.errors import GlimpseError
from gp_jax.evaluation.judge import asking
from gp_jax.evaluation.settings import JudgeConfig
from gp_jax.evaluation.verdicts import Question, read_cache
from gp_jax.runtime.disk import path_of

LEAST_WAIT, LONGEST_WAIT = 0.1, 300.0  # seconds between two rounds without a verdict; doubled from judge.patience on
STRIKES = 2  # rounds in which a server that is there does not serve a question: then the question is given up


class PatientJudge:
    """Asks until every question has a verdict, or a reason of its own to have none.

    Questions that the server did not serve (no connection, timeouts, no completion, 401, 403, 404, 429, 5xx) are asked again. Whether the
    server is there at all is found out with a question of ours: if that is not served either, the server is gone, and we wait for it.
    """

    def __init__(self, config: JudgeConfig, cache: Path, hours: float, tell: Callable[[str], None]):
        """cache: file that stores verdicts, which only this process writes; judge.cache replaces it. hours: longest time without a question
        that is settled. tell: receives a line when an outage begins and one when it ends."""
        self.config, self.seconds, self.tell = config, hours * 3600, tell
        self.cache = path_of(config.cache) if config.cache else cache
        self.known: dict[str, float] | None = None  # scores by digest

    async def ask(self, questions: Sequence[Question]) -> tuple[dict[Question, float], dict[Question, str]]:
        """Asks equal questions once. Returns: scores 0..1, and the reason per question that has none.

        Raises: GlimpseError that names judge.url when nothing was settled for too long, and for a cache that cannot be read or written.
        """
        scores: dict[Question, float] = {}
        failures: dict[Question, str] = {}
        strikes: Counter[Question] = Counter()
        left, since, wait = list(dict.fromkeys(questions)), time.monotonic(), self.first_wait
        while left:
            before = len(left)
            found = await asking(self.config, left, self.cache, self.stored, quiet=True)
            odd = [question for question, may_be_odd in found.unserved.items() if may_be_odd]
            scores |= found.scores
            failures |= {question: why for question, why in found.failures.items() if question not in found.unserved}
            left = sorted(found.unserved, key=lambda question: found.unserved[question])  # first those that were perhaps never sent
            gone = await self.gone() if left else ""
            if left and not gone:
                strikes.update(odd)
                failures |= {question: found.failures[question] for question in odd if strikes[question] >= STRIKES}
                left = [question for question in left if question not in failures]
            if len(left) < before:
                since, wait = time.monotonic(), self.first_wait
            if gone:
                await self.until_back(gone, since, wait)
            elif left:
                if not odd:
                    self.check(since, next(iter(found.failures.values())))
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
        return scores, failures

    async def until_back(self, gone: str, since: float, wait: float) -> None:
        """Waits, longer from try to try, until the server is there. gone: why it is not; since: time of the last settled question."""
        hours = f"{self.seconds / 3600:g} hours"
        self.tell(f"the judge at {self.config.shown} does not answer ({gone}): waiting for it, {hours} at most")
        began = time.monotonic()
        while gone:
            self.check(since, gone)
            await asyncio.sleep(max(0.0, min(wait, since + self.seconds - time.monotonic())))
            wait, gone = min(2 * wait, LONGEST_WAIT), await self.gone()
        self.tell(f"the judge at {self.config.shown} answers again, after {time.monotonic() - began:.0f} s")

    def check(self, since: float, why: str) -> None:
        """Raises: GlimpseError when the time of waiting is over."""
        if time.monotonic() - since >= self.seconds:
            said = f"judge.url={self.config.shown!r}: no verdict for {self.seconds / 3600:g} hours (outage_hours)"
            raise GlimpseError(f"{said}, last: {why}")

    async def gone(self) -> str:
        """Why the server does not serve a question with nothing odd in it; "" if it does. One try."""
        question = ("Is ice cold?", "yes", f"Yes. ({time.time_ns()})")  # another one each time: it must not come from the cache
        found = await asking(dataclasses.replace(self.config, retries=0), [question], self.cache, self.stored, quiet=True)
        return found.failures[question] if question in found.unserved else ""

    @property
    def stored(self) -> dict[str, float]:
        """Scores by digest, read from disk once."""
        if self.known is None:
            self.known = read_cache(self.cache)
        return self.known

    @property
    def first_wait(self) -> float:
        """Seconds."""
        return max(self.config.patience, LEAST_WAIT)
