"""The one thread that answers: it takes requests from the queue, reads prompts, places them in pools and lets rows generate.

Requests are read and placed in the order in which they came: none is passed over for long. A prompt that was read and finds no place waits
for one, and nothing else is read before it has it, so at most one prefix lies outside the pools. While a prompt is read, running rows get
a token at least every `gap` seconds (see `reading.GivingWay`).
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gp_jax.errors import GlimpseError
from gp_jax.inference.engine import Engine
from gp_jax.serving.inbox import Inbox
from gp_jax.serving.jobs import Ended, Event, Failed, Gone, Job, Tokens
from gp_jax.serving.lengths import Lengths
from gp_jax.serving.meters import Meters
from gp_jax.serving.pools import Pool, Pools
from gp_jax.serving.reading import Read, Reader
from gp_jax.serving.vision_cache import VisionCache

LOG = logging.getLogger("gp_jax.serving")
NOTED = ("logprobs", "best")  # fields of the state that a request's `noted` is about
TRIES = 3  # errors of programs in a row, with no token in between, after which the server says that it is not ready
BROKEN = "the model's logits are not finite numbers"
INTERNAL = "the server failed to answer this request"
LATE = "the request took longer than the server allows (--timeout)"


class Loop(threading.Thread):
    """Answers requests until it is stopped."""

    def __init__(
        self,
        engine: Engine,
        lengths: Lengths,
        cache: VisionCache,
        meters: Meters,
        gap: float = 0.2,
        visit: float = 0.02,
        queue: int = 64,
        post: Callable[[Sequence[tuple[Job, Event]]], Any] | None = None,
    ):
        """post: takes events to the thread of their receivers; None: they are delivered in this one."""
        super().__init__(name="gp_jax-answers", daemon=True)
        self.engine, self.meters, self.gap, self.visit, self.inbox = engine, meters, gap, visit, Inbox(queue)
        self.post = post or (lambda batch: [job.deliver(event) for job, event in batch])
        self.pools, self.cache = Pools(engine, lengths), cache
        self.reader = Reader(engine, lengths.ladders, cache, self.between, lambda: self.seconds["decode"] + self.seconds["host"])
        self.reading: Job | None = None
        self.ready: Read | None = None
        self.errors = 0
        self.seconds = {"decode": 0.0, "host": 0.0}
        self.step_seconds: dict[tuple[int, int], float] = {}  # of a pool's capacity and size
        self.last_step = 0.0
        self.outbox: list[tuple[Job, Event]] = []

    # For other threads.

    def submit(self, job: Job) -> None:
        """Puts a request into the queue. Raises: Busy when it is full; Draining."""
        self.inbox.put(job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for this answer any more: its place is free within a step."""
        job.gone = True
        self.inbox.notify()

    def drain(self) -> None:
        """Takes no more requests; those that are here are answered."""
        self.inbox.draining = True

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self.inbox.stop()

    @property
    def healthy(self) -> bool:
        """Whether answers can be expected."""
        return self.errors < TRIES and self.is_alive()

    @property
    def idle(self) -> bool:
        """Whether no request is here."""
        return not (len(self.inbox) or self.reading or self.ready or self.pools.running)

    def retry_after(self) -> int:
        """Seconds after which the queue should have room."""
        return max(1, min(60, round(self.meters.request_seconds * 0.5)))

    # The thread.

    def run(self) -> None:
        while not self.inbox.stopping:
            try:
                self.turn()
            except Exception:  # of the server itself: programs' errors are handled where their requests are known
                LOG.exception("the loop failed")
                self.errors += 1
                self.fail_all()
            if self.idle:
                self.inbox.wait(1.0)
        self.fail_all()

    def turn(self) -> None:
        """One round: forget who is gone, admit, generate, deliver."""
        start, before = time.perf_counter(), self._device()
        self.sweep()
        if self.ready is None and (job := self.inbox.take()) is not None:
            self.read(job)
        if self.ready is not None:
            self.place()
        if self.pools.running:
            self.step()
        self.pools.settle()
        self.flush()
        self.seconds["host"] += max(0.0, time.perf_counter() - start - (self._device() - before))
        self.meters.state(len(self.inbox) + (self.reading is not None) + (self.ready is not None), self.pools, self.cache, self.stages)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of vision, prefill, decode and host so far."""
        return {**self.reader.seconds, **self.seconds}

    def _device(self) -> float:
        return sum(self.reader.seconds.values()) + self.seconds["decode"] + self.seconds["host"]

    def read(self, job: Job) -> None:
        """Reads a prompt."""
        try:
            self.reading = job
            job.check()
            job.times["begun"] = time.monotonic()
            self.ready = self.reader.read(job)
        except Exception as error:
            self.give_up(job, error)
        finally:
            self.reading = None

    def between(self, result: Any) -> None:
        """Between two programs of a prefill: lets rows go on if it is time, and looks whether the answer is still wanted."""
        if self.reading is not None:
            self.reading.check()
        if self.pools.running:
            jax.block_until_ready(result)
            if time.monotonic() - self.last_step >= self.gap:
                reading, self.reading = self.reading, None  # a step is no part of this prefill
                start, before = time.perf_counter(), self._device()
                try:
                    self.sweep()
                    self.step(one=True)
                    self.flush()
                finally:
                    self.reading = reading
                    self.seconds["host"] += max(0.0, time.perf_counter() - start - (self._device() - before))

    def place(self) -> None:
        """Puts the prompt that was read into a pool, if there is room."""
        assert self.ready is not None, "a prompt that was read"
        read = self.ready
        try:
            pool = self.pools.find(read.prefix)
            if pool is None:
                return
            self.ready = None
            number = pool.insert(read.job, read.prefix)
        except Exception as error:
            self.ready = None
            self.give_up(read.job, error)
            for own in self.pools:
                if own.torn:
                    self.drop(own, error)
            return
        self.outbox.append((read.job, read.started))
        self.meters.started(read.job, read.started)
        self.take(pool, only=number)
        self.flush()

    def step(self, one: bool = False) -> None:
        """Some tokens for every row. one: a single one each."""
        begun: list[tuple[Pool, int, float]] = []
        for pool in self.pools:
            if pool.running:
                start = time.perf_counter()
                try:
                    assert pool.rows is not None, "a pool with rows"
                    count = 1 if one else self.count(pool)
                    pool.rows.generate(count)
                    self.seconds["host"] += time.perf_counter() - start
                    start = time.perf_counter()
                    jax.block_until_ready(pool.rows.state.step)
                    begun.append((pool, count, time.perf_counter() - start))
                    self.seconds["decode"] += begun[-1][2]
                except Exception as error:
                    self.drop(pool, error)
        self.last_step = time.monotonic()
        for pool, count, seconds in begun:
            key, per = (pool.capacity, pool.size), seconds / count
            self.step_seconds[key] = 0.7 * self.step_seconds.get(key, per) + 0.3 * per
            try:
                self.take(pool)
            except Exception as error:
                self.drop(pool, error)

    def count(self, pool: Pool) -> int:
        """Steps until the host looks again. While others wait, no longer than until the first row must end."""
        left = [job.max_new_tokens - job.sent for _, job in pool.running]
        most = min(left) if len(self.inbox) or self.ready else max(left)
        seconds = self.step_seconds.get((pool.capacity, pool.size), self.visit)
        return max(1, min(int(self.visit / max(seconds, 1e-6)), most))

    def take(self, pool: Pool, only: int | None = None) -> None:
        """Delivers a pool's new tokens, and frees the rows that have ended. only: of one place."""
        assert pool.rows is not None, "a pool with rows"
        more = NOTED[: max((job.noted for _, job in pool.running), default=0)]
        tokens, steps, done, broken, *rest = pool.rows.read("tokens", "step", "done", "broken", *more)
        if only is None:
            self.errors = 0
        for place, job in pool.running:
            if only is not None and place != only:
                continue
            count = int(steps[place])
            if broken[place]:
                self.outbox.append((job, Failed(500, BROKEN)))
                self.meters.ended(job, "error")
                pool.free(place)
            elif count > job.sent:
                fresh = slice(job.sent, count)
                logprobs = rest[0][1][place, fresh].copy() if job.noted else None
                best = tuple(x[place, fresh].copy() for x in rest[1]) if job.noted > 1 else None
                self.outbox.append((job, Tokens(tokens[place, fresh].copy(), logprobs, best)))
                self.meters.tokens(job, count - job.sent)
                job.sent = count
            if done[place] and not broken[place]:
                ended = "stop" if count and int(tokens[place, count - 1]) in self.engine.config.eos_token_ids else "length"
                self.outbox.append((job, Ended(ended)))
                self.meters.ended(job, ended)
                pool.free(place)

    def sweep(self) -> None:
        """Frees what belongs to requests that nobody waits for, or whose time is over."""
        self.inbox.filter(lambda job: not self._over(job))
        if self.ready is not None and self._over(self.ready.job):
            self.ready = None
        for pool in self.pools:
            for place, job in pool.running:
                if self._over(job):
                    pool.free(place)

    def _over(self, job: Job) -> bool:
        """Whether a request ends here; its receiver is told."""
        try:
            job.check()
        except (Gone, TimeoutError) as error:
            self.give_up(job, error)
            return True
        return False

    def give_up(self, job: Job, error: Exception) -> None:
        """Ends one request with what its receiver is told."""
        if isinstance(error, Gone):
            return self.meters.ended(job, "abort")
        if isinstance(error, TimeoutError):
            self.outbox.append((job, Failed(504, LATE)))
            return self.meters.ended(job, "timeout")
        if isinstance(error, GlimpseError):
            self.outbox.append((job, Failed(400, str(error))))
            return self.meters.ended(job, "error")
        LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
        self.outbox.append((job, Failed(500, INTERNAL)))
        return self.meters.ended(job, "error")

    def drop(self, pool: Pool, error: Exception) -> None:
        """Ends the requests of a pool whose programs failed. Its arrays are given up; it begins anew with the next request."""
        LOG.error("a pool of capacity %d failed: %s", pool.capacity, type(error).__name__, exc_info=error)
        self.errors += 1
        for job in pool.drop():
            self.outbox.append((job, Failed(500, INTERNAL)))
            self.meters.ended(job, "error")

    def fail_all(self) -> None:
        """Ends every request that is here."""
        jobs = self.inbox.clear() + ([self.ready.job] if self.ready else [])
        self.ready = None
        for pool in self.pools:
            jobs += pool.drop()
        for job in jobs:
            self.outbox.append((job, Failed(503 if self.inbox.stopping else 500, INTERNAL)))
            self.meters.ended(job, "error")
        self.flush()

    def flush(self) -> None:
        """Sends what is to be delivered."""
        if self.outbox:
            batch, self.outbox = self.outbox, []
            self.post(batch)
