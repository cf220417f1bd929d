"""Scores of a language model behind an OpenAI-compatible endpoint, as Visual-CoT (Shao et al. 2024) and GlimpsePrune score free answers.

Verdicts are stored on disk under a digest of the request (endpoint, model, messages, settings), so that each is paid for once. Requests
that fail and replies that cannot be read give no score: they are reported and left out, and the next run asks again.
"""

import asyncio
import json
import math
import os
import time
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx2

from gp_jax.errors import GlimpseError, one_line
from gp_jax.evaluation.jsonl import appending
from gp_jax.evaluation.redaction import redactor
from gp_jax.evaluation.settings import JudgeConfig
from gp_jax.evaluation.verdicts import Question, Verdicts, digest, read_cache, read_score, request
from gp_jax.runtime.disk import parse_json, writing
from gp_jax.runtime.progress import Progress

TRY_AGAIN = {408, 409, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
HOPELESS = {401, 405}  # status codes that every further request would get too
REFUSED = {403, 404}  # status codes that concern one question (moderation) or all of them
REFUSALS = 5  # this many refusals without a verdict in between: they concern all questions
GIVE_UP = 10  # this many requests in a row that fail after all of their tries: the server is gone
LONGEST_WAIT = 120.0  # seconds between tries
MOST_BYTES = 1 << 20  # of a reply, compressed or not
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


class Failed(Exception):
    """A question without a verdict; the message says why."""


class Unserved(Failed):
    """A question that the server did not serve. odd: whether the question itself may be why, else only the server."""

    def __init__(self, reason: str, odd: bool = True):
        super().__init__(reason)
        self.odd = odd


class Hopeless(Unserved):
    """A question without a verdict, when further requests would fail too."""


def judge(config: JudgeConfig, questions: Sequence[Question], cache: Path, quiet: bool | None = None) -> Verdicts:
    """Scores questions, equal ones once. cache: the file that stores verdicts."""
    return asyncio.run(asking(config, questions, cache, read_cache(cache), quiet))


async def asking(
    config: JudgeConfig, questions: Sequence[Question], cache: Path, known: dict[str, float], quiet: bool | None = None
) -> Verdicts:
    """As `judge`, inside an event loop. known: scores by digest, as `read_cache` returns them; new ones are added to it."""
    verdicts = Verdicts()
    todo: dict[str, Question] = {}
    for question in dict.fromkeys(questions):
        key = digest(config, question)
        if key in known:
            verdicts.scores[question] = known[key]
            verdicts.cached += 1
        else:
            todo[key] = question
    verdicts.asked = len(todo)
    if todo:
        await _Asking(config, cache, verdicts, known, quiet).all(todo)
    return verdicts


class _Asking:
    """The requests of one run, within the limits at a time and per minute."""

    def __init__(self, config: JudgeConfig, cache: Path, verdicts: Verdicts, known: dict[str, float], quiet: bool | None):
        self.config, self.cache, self.verdicts, self.known, self.quiet = config, cache, verdicts, known, quiet
        self.next_start, self.failed, self.refused, self.hopeless = 0.0, 0, 0, ""
        self.key = os.environ.get(config.key)
        self.redact = redactor(self.key, config.url)

    async def all(self, todo: dict[str, Question]) -> None:
        """Asks all questions; every verdict is on disk before the next one is awaited."""
        headers = HEADERS | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        gate, waiting = asyncio.Semaphore(self.config.at_once), self.config.timeout
        with writing(self.cache):
            self.cache.parent.mkdir(parents=True, exist_ok=True)
        with appending(self.cache) as append, Progress(total=len(todo), desc="judge", unit="answer", disable=self.quiet) as bar:
            async with httpx2.AsyncClient(headers=headers, timeout=waiting) as client:

                async def one(digest: str, question: Question) -> None:
                    async with gate:
                        try:
                            verdict, score = await self.verdict(client, question)
                        except Failed as error:
                            self.verdicts.failures[question] = str(error)
                            if isinstance(error, Unserved):
                                self.verdicts.unserved[question] = error.odd
                        else:
                            line = {"key": digest, "score": score, "model": self.config.model, "asked": question, "verdict": verdict}
                            append(json.dumps(line))
                            self.verdicts.scores[question] = self.known[digest] = score
                        bar.update()

                tasks = [asyncio.ensure_future(one(digest, question)) for digest, question in todo.items()]
                try:
                    await asyncio.gather(*tasks)
                finally:  # e.g. when the disk is full
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

    async def verdict(self, client: httpx2.AsyncClient, question: Question) -> tuple[str, float]:
        """A verdict without secrets, and its score. Raises: Failed for every kind of failure."""
        try:
            verdict = self.redact(await self.ask(client, question))
            score = read_score(verdict)
        except Failed:
            raise
        except Exception as error:  # no reply of a server may end an evaluation
            raise Failed(f"reply that cannot be read ({type(error).__name__})") from error
        if score is None:
            raise Failed("verdict that cannot be read")
        return verdict, score

    async def ask(self, client: httpx2.AsyncClient, question: Question) -> str:
        """A verdict. Raises: Failed."""
        wait, reason, odd = self.config.patience, "", False
        for attempt in range(self.config.retries + 1):
            if self.hopeless:
                raise Hopeless(self.hopeless, odd=False)
            await self.turn()
            try:
                verdict = await self.once(client, question)
                self.failed = self.refused = 0
                return verdict
            except Hopeless as error:
                self.hopeless = str(error)
                raise
            except _Again as error:
                reason, odd = str(error), error.odd
                if attempt < self.config.retries:
                    await asyncio.sleep(min(max(wait, error.after), LONGEST_WAIT))
                    wait *= 2
        self.failed += 1
        if self.failed >= GIVE_UP:
            self.hopeless = f"{reason} ({GIVE_UP} times in a row, not asked further)"
        raise Unserved(reason, odd)

    async def turn(self) -> None:
        """Waits until a request may start."""
        if self.config.per_minute:
            now = time.monotonic()
            start = max(now, self.next_start)
            self.next_start = start + 60 / self.config.per_minute
            await asyncio.sleep(start - now)

    async def once(self, client: httpx2.AsyncClient, question: Question) -> str:
        """One try. Raises: Failed, Hopeless, or _Again when another may succeed."""
        try:
            url, body = f"{self.config.url.rstrip('/')}/chat/completions", json.dumps(request(self.config, question)).encode()
            async with asyncio.timeout(self.config.timeout):  # for the whole request: a server may send single bytes
                async with client.stream("POST", url, content=body) as reply:
                    if reply.status_code in TRY_AGAIN:
                        after = _seconds(reply.headers.get("retry-after"))
                        raise _Again(f"status {reply.status_code}", after, odd=reply.status_code != 429)
                    content = await _read(reply)
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise _Again("timeout", odd=not isinstance(error, httpx2.ConnectTimeout)) from error
        except httpx2.HTTPError as error:
            raise _Again(f"no answer from the server ({type(error).__name__})", odd=not isinstance(error, httpx2.ConnectError)) from error
        if reply.status_code != 200:
            said = one_line(self.redact(content.decode("utf-8", "replace")), 120) if content.strip() else ""
            reason = f"status {reply.status_code} {said}".rstrip()
            self.refused += reply.status_code in REFUSED
            if reply.status_code in HOPELESS or self.refused >= REFUSALS:
                raise Hopeless(reason, odd=reply.status_code in REFUSED)
            raise (Unserved if reply.status_code in REFUSED else Failed)(reason)
        try:
            verdict = parse_json(content, "reply")["choices"][0]["message"]["content"]
        except (GlimpseError, LookupError, TypeError) as error:
            raise _Again("reply that is no chat completion") from error
        if not isinstance(verdict, str):
            raise Failed("verdict that cannot be read")
        return verdict


async def _read(reply: httpx2.Response) -> bytes:
    """A reply's body. Raises: Failed when it is too large, or compressed although that was not requested."""
    received, coding = bytearray(), reply.headers.get("content-encoding", "identity").strip().lower()
    async for chunk in reply.aiter_raw():
        received += chunk
        if len(received) > MOST_BYTES:
            raise Failed("reply that is too large")
    content = bytes(received)
    if coding in ("gzip", "x-gzip", "deflate"):
        content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, MOST_BYTES + 1)
    elif coding not in ("", "identity"):
        raise Failed("reply that is compressed")
    if len(content) > MOST_BYTES:
        raise Failed("reply that is too large")
    return content


class _Again(Exception):
    """A try that failed while another may succeed. after: seconds to wait, as requested by the server; odd: as in `Unserved`."""

    def __init__(self, reason: str, after: float = 0.0, odd: bool = True):
        super().__init__(reason)
        self.after, self.odd = after, odd


def _seconds(header: str | None) -> float:
    """The seconds in a Retry-After header, a number or a date; 0 if it is neither."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header or "") - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            seconds = 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
