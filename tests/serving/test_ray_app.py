"""Two replicas behind Ray Serve, one of which is killed under load. Answers are scripted; Ray is not, so this is skipped without it."""

import concurrent.futures
import importlib.util
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gp_jax import GlimpseError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'gp_jax[ray]'")
TESTS = Path(__file__).parents[1]


def scripted(settings):
    """A replica's server, in a process of Ray's. Its answers take two seconds; it notes whose requests it takes."""
    import http_tools

    made = http_tools.scripted(Path(tempfile.mkdtemp()))
    made.loop.pause, put = 0.1, made.loop.inbox.put

    def submit(job):
        put(job)
        with open(os.environ["TAKEN"], "a") as file:
            file.write(f"{os.getpid()}\n")

    made.loop.submit = submit
    return made


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    return tmp_path_factory.mktemp("ray") / "taken"


@pytest.fixture(scope="module")
def ray_serve(taken):
    for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "RAY_raylet_start_wait_time_s"):
        os.environ.setdefault(name, "120")  # of Ray, which gives up a machine that is busy

    import ray
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TAKEN": str(taken)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield serve, f"http://127.0.0.1:{port}/v1/chat/completions"
    serve.shutdown()
    ray.shutdown()


def test_a_replica_that_is_killed_takes_only_its_own_answers_with_it(ray_serve, taken):
    import httpx2 as httpx
    from http_tools import ANSWER, ask, settings

    from gp_jax.serving.ray_app import replicas

    serve, where = ray_serve
    serve.run(replicas(settings(), scripted, num_replicas=2, ray_actor_options={"num_cpus": 0.5}), name="gp_jax")
    body = {"model": "tiny", "messages": ask(), "temperature": 0, "max_tokens": 32}

    def one(number):
        try:
            found = httpx.post(where, json=body, headers={"Authorization": "Bearer secret"}, timeout=60)
            return found.json()["choices"][0]["message"]["content"] if found.status_code == 200 else found.status_code
        except httpx.HTTPError as error:
            return type(error).__name__

    assert one(0) == ANSWER
    with concurrent.futures.ThreadPoolExecutor(6) as users:
        asked = [users.submit(one, number) for number in range(6)]
        while len(taken.read_text().split()) < 7 or len(set(taken.read_text().split()[1:])) < 2:
            time.sleep(0.05)
        by = taken.read_text().split()[1:]
        killed = by[-1]
        os.kill(int(killed), signal.SIGKILL)
        found = [future.result() for future in asked]
    assert found.count(ANSWER) >= sum(own != killed for own in by) > 0, (found, by)
    assert one(0) == ANSWER, "and it goes on"


def test_settings_by_name():
    from gp_jax.serving.ray_app import app

    with pytest.raises(GlimpseError, match="there is no setting kv_memroy"):
        app({"model": "scenes", "kv_memroy": "2G"})
    with pytest.raises(GlimpseError, match="max_rows"):
        app({"model": "scenes", "max_rows": "many"})
    assert app({"model": "scenes", "max_rows": "8", "methods": "fastv visionzip"})
