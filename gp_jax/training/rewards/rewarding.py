"""Rewards of completions: the terms of every data source, weighted and summed. Nothing that is missing counts as 0.

Named rewards are functions of one completion. Functions of users get all of their completions at once, as TRL calls them: by name, every
argument a list, `f(prompts=[...], completions=[...], answer=[...], ...) -> list[float | None]`, `async` or not. They and the judge run at
the same time.
"""

import asyncio
import contextlib
import inspect
import itertools
import math
import queue
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gp_jax.errors import GlimpseError, reason, shown
from gp_jax.evaluation.verdicts import Question
from gp_jax.training.rewards.functions import JUDGE, REWARDS, Completion
from gp_jax.training.rewards.judge import PatientJudge
from gp_jax.training.rewards.settings import RewardConfig, RewardTerm, columns_of, find_function

POLL = 0.5  # seconds between two looks at `stopped`
GRACE = 2.0  # seconds in which what was stopped may end by itself
Value = float | str  # a reward, or why it is missing
T = TypeVar("T")


class Stopped(Exception):
    """The run was asked to stop while rewards were made."""


@dataclass(frozen=True)
class Rewarded:
    """The reward of a completion. total: the weighted sum, None when it is missing; terms: by name, without weights; reason: why it is
    missing, "" when it is not."""

    total: float | None
    terms: dict[str, float | None]
    reason: str = ""


class Rewards:
    """Rewards completions by the terms of their data sources."""

    def __init__(
        self, config: RewardConfig, per_source: Sequence[Sequence[RewardTerm]], cache: Path, tell: Callable[[str], None] = print
    ) -> None:
        """per_source: terms by `Completion.source`, empty ones: those of `config`; none at all: those of `config` for every source. cache:
        file that stores verdicts, which only this process writes. tell: receives notes, in the calling thread.

        Raises: GlimpseError for settings that `config.check` and `check_terms` refuse too: functions that cannot be found.
        """
        self.config, self.per_source, self.tell = config, per_source, tell
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.judge = PatientJudge(config.judge, cache, config.outage_hours, self.lines.put)
        names = dict.fromkeys(term.name for terms in (config.terms, *per_source) for term in terms)
        self.functions = {name: find_function(name) for name in names if ":" in name}

    def __call__(self, completions: Sequence[Completion], stopped: Callable[[], bool] = lambda: False) -> list[Rewarded]:
        """Rewards completions, in their order. stopped: looked at every half second.

        Raises: GlimpseError when a function of a user fails and when the judge is gone for too long; Stopped.
        """
        terms = [self._terms(completion) for completion in completions]
        places: dict[str, list[int]] = {}  # name -> numbers of the completions
        for number, own in enumerate(terms):
            for term in own:
                places.setdefault(term.name, []).append(number)
        try:
            found = _run(
                lambda: self._all({name: [completions[i] for i in numbers] for name, numbers in places.items()}), stopped, self._say
            )
        finally:
            self._say()
        values = {name: dict(zip(numbers, found[name], strict=True)) for name, numbers in places.items()}
        return [_add(own, {term.name: values[term.name][number] for term in own}) for number, own in enumerate(terms)]

    def _terms(self, completion: Completion) -> Sequence[RewardTerm]:
        return (self.per_source[completion.source] if self.per_source else ()) or self.config.terms

    def _say(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.tell(self.lines.get_nowait())

    async def _all(self, asked: Mapping[str, list[Completion]]) -> dict[str, list[Value]]:
        tasks = [asyncio.ensure_future(self._term(name, completions)) for name, completions in asked.items()]
        try:
            return dict(zip(asked, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _term(self, name: str, completions: list[Completion]) -> list[Value]:
        if name == JUDGE:
            return await self._judged(completions)
        if name in self.functions:
            return _read(name, await _call(name, self.functions[name], completions), len(completions))
        return [_named(name, completion, self.config.length_free) for completion in completions]

    async def _judged(self, completions: list[Completion]) -> list[Value]:
        questions = [_question(completion) for completion in completions]
        scores, failures = await self.judge.ask([question for question in questions if question])
        return ["no reference answer" if q is None else scores[q] if q in scores else failures[q] for q in questions]


def check_missing(rewarded: Sequence[Rewarded], most: float) -> None:
    """Raises: GlimpseError when a larger share than `most` (0..1) of a step's completions has no reward, with the reasons counted."""
    reasons = Counter(found.reason for found in rewarded if found.total is None)
    if reasons.total() > most * len(rewarded) + 1e-9:
        listed = ", ".join(f"{count} x {why}" for why, count in reasons.most_common(4)) + (", ..." if len(reasons) > 4 else "")
        raise GlimpseError(f"{reasons.total()} of {len(rewarded)} completions have no reward (most_missing={most:g}): {listed}")


def _add(terms: Sequence[RewardTerm], values: Mapping[str, Value]) -> Rewarded:
    found = {name: None if isinstance(value, str) else value for name, value in values.items()}
    why = "; ".join(f"{name}: {value}" for name, value in values.items() if isinstance(value, str))
    if not why:
        total = sum(term.weight * value for term in terms if (value := found[term.name]) is not None)
        if math.isfinite(total):
            return Rewarded(float(total), found)
        why = "the sum is infinite"
    return Rewarded(None, found, why)


def _named(name: str, completion: Completion, free: float) -> Value:
    try:
        return float(REWARDS[name](completion, free))
    except GlimpseError as error:
        return str(error)


def _question(completion: Completion) -> Question | None:
    """What the judge is asked. Several references are joined by "or"."""
    try:
        return completion.question, " or ".join(dict.fromkeys(completion.answers)), completion.text
    except GlimpseError:
        return None


# Functions of users ---------------------------------------------------------------------------------------------------------


async def _call(name: str, function: Callable[..., Any], completions: Sequence[Completion]) -> Any:
    """What a function returns. Raises: GlimpseError that names the function for whatever it raises."""
    columns = {column: [_cell(column, completion) for completion in completions] for column in columns_of(function, name)}
    try:
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return await function(**columns)
        result, error = await asyncio.wrap_future(_in_thread(lambda: _caught(function, columns)))
        if error is not None:
            raise error
        return await result if inspect.isawaitable(result) else result
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        own = [frame for frame in frames if frame.filename == file] or list(frames)
        what = reason(error) if isinstance(error, Exception) else type(error).__name__
        raise GlimpseError(f"reward {name!r} failed in {Path(own[-1].filename).name} line {own[-1].lineno}: {what}") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise GlimpseError(f"reward {name!r} failed: CancelledError") from error


def _cell(column: str, completion: Completion) -> Any:
    same = {"prompts": completion.question, "completions": completion.text}
    if column == "completion_ids":
        return list(completion.tokens)
    return same[column] if column in same else getattr(completion, column)


def _caught(function: Callable[..., Any], columns: Mapping[str, Any]) -> tuple[Any, BaseException | None]:
    try:
        return function(**columns), None
    except BaseException as error:  # a future does not carry every kind of error
        return None, error


def _read(name: str, result: Any, count: int) -> list[Value]:
    """The rewards in what a function returned. Raises: GlimpseError that names the function when they are no list of `count` items."""
    try:
        if isinstance(result, str | bytes | Mapping | set | frozenset):
            raise TypeError
        values = list(itertools.islice(iter(result), count + 1))
    except Exception as error:
        raise GlimpseError(f"reward {name!r} returned {shown(result)}, which is not a list of numbers") from error
    if len(values) != count:
        many = f"{len(values)} rewards" if len(values) < count else "more rewards than that"
        raise GlimpseError(f"reward {name!r} got {count} completions and returned {many}")
    return [_number(value) for value in values]


def _number(value: Any) -> Value:
    if value is None:
        return "None"
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # any object may be in the list
        number = math.nan
    return number if math.isfinite(number) else f"{shown(value, 40)} is not a finite number"


# Running --------------------------------------------------------------------------------------------------------------------


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Starts work in a thread of its own, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="rewards", daemon=True).start()
    return future


def _run(make: Callable[[], Coroutine[Any, Any, T]], stopped: Callable[[], bool], say: Callable[[], None]) -> T:
    """Runs a coroutine in a thread with an event loop, so that nothing in it keeps this thread from stopping. Raises: Stopped."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await make()

    future = _in_thread(lambda: asyncio.run(main()))
    try:
        while not wait([future], POLL).done:
            say()
            if stopped():
                raise Stopped
        return future.result()
    finally:
        for loop, task in running if not future.done() else ():
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
            wait([future], GRACE)
