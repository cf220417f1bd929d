"""The requests that wait, between the thread that receives them and the one that answers them."""

import threading
import time
from collections import deque
from collections.abc import Callable

from gp_jax.serving.jobs import Job


class Busy(Exception):
    """The queue is full."""


class Draining(Exception):
    """The server takes no more requests."""


class Inbox:
    """At most `limit` requests, in the order in which they came."""

    def __init__(self, limit: int):
        self.limit, self.waiting = limit, deque[Job]()
        self.draining = self.stopping = False
        self.news = threading.Condition()

    def __len__(self) -> int:
        return len(self.waiting)

    def put(self, job: Job) -> None:
        """Raises: Busy when it is full; Draining."""
        with self.news:
            if self.draining or self.stopping:
                raise Draining
            if len(self.waiting) >= self.limit:
                raise Busy
            job.times["arrived"] = time.monotonic()
            self.waiting.append(job)
            self.news.notify()

    def take(self) -> Job | None:
        """The one that waits for longest."""
        with self.news:
            return self.waiting.popleft() if self.waiting else None

    def filter(self, stays: Callable[[Job], bool]) -> None:
        """Lets go of those that no longer wait."""
        with self.news:
            self.waiting = deque(job for job in self.waiting if stays(job))

    def clear(self) -> list[Job]:
        """Lets go of all. Returns: them."""
        with self.news:
            found, self.waiting = list(self.waiting), deque()
        return found

    def notify(self) -> None:
        """Wakes the answering thread."""
        with self.news:
            self.news.notify()

    def wait(self, seconds: float) -> None:
        """Sleeps until there is news, unless there is some already."""
        with self.news:
            if not self.waiting and not self.stopping:
                self.news.wait(seconds)

    def stop(self) -> None:
        """Wakes the answering thread so that it ends."""
        with self.news:
            self.stopping = True
            self.news.notify()
