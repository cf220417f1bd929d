"""Users of locust, as `benchmarks.serve --locust` runs them: each takes the next request of a file until none is left."""

import json
import os
from pathlib import Path

from locust import HttpUser, constant, task
from locust.exception import StopUser

LEFT = iter(json.loads(Path(os.environ["GP_JAX_ASKED"]).read_text()))
WAITING = set()  # users that have not found the end yet


class Asker(HttpUser):
    """Asks again as soon as an answer is whole."""

    wait_time = constant(0)

    def on_start(self) -> None:
        WAITING.add(self)

    @task
    def ask(self) -> None:
        """One request. When there are no more the last user ends the run."""
        request = next(LEFT, None)
        if request is not None:
            self.client.post("/v1/chat/completions", json=request, name="answer")
            return
        WAITING.discard(self)
        if not WAITING:
            self.environment.runner.quit()
        raise StopUser
