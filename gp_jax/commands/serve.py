"""The command `gp-jax serve`."""

import importlib.util
import logging
import sys
import time

import tyro

from gp_jax.errors import GlimpseError
from gp_jax.serving.settings import ServerSettings

NEEDED = ("starlette", "uvicorn", "prometheus_client")


def parse(argv: list[str]) -> ServerSettings:
    """Reads the command line. Raises: GlimpseError for values that make no sense."""
    return tyro.cli(ServerSettings, args=argv, prog="gp-jax serve", config=(tyro.conf.HelptextFromCommentsOff,))


def run(settings: ServerSettings) -> None:
    """Runs `gp-jax serve` until a signal ends it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise GlimpseError(f"serving needs {', '.join(missing)}: pip install 'gp_jax[serve]'")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("gp_jax.serving").setLevel(logging.INFO)
    from gp_jax.serving.server import Server, listen

    listen(settings).close()  # a port that is taken is said before everything is compiled
    start = time.perf_counter()
    server = Server.load(settings, progress=True)
    print(f"gp-jax serve: ready after {time.perf_counter() - start:.1f} s", file=sys.stderr)
    server.run()
