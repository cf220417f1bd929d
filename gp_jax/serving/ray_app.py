"""The server as an application of Ray Serve: replicas behind Ray's proxy, as many as the load asks for.

    serve run gp_jax.serving.ray_app:app model=scenes kv_memory=2G

Ray decides how many replicas there are and which of them gets a request. A replica is one `gp-jax serve` without its port.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
from ray import serve

from gp_jax.errors import GlimpseError, one_line, some
from gp_jax.serving.server import Server, begin
from gp_jax.serving.settings import ServerSettings

AUTOSCALING = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}
RAYS_OWN = ("host", "port")  # its proxy listens
LISTS = ("capacities", "methods", "fetch_hosts")  # on the command line of `serve run`: separated by spaces
HERE: list[Server] = []  # the server of this process


def asgi() -> Any:
    """The application of the replica in this process."""
    return HERE[-1].asgi


class Replica:
    """One server. Ray calls what is here."""

    def __init__(self, settings: ServerSettings, build: Callable[[ServerSettings], Server]):
        """build: reads the model and compiles every program; Ray sends no requests before. It calls this in the event loop."""
        self.server = build(settings)
        HERE.append(self.server)
        begin(self.server.loop)

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self.server.loop.healthy:
            raise RuntimeError("the answering thread has ended, or its programs fail")

    def __del__(self) -> None:
        if hasattr(self, "server"):
            self.server.loop.stop()


def replicas(settings: ServerSettings, build: Callable[[ServerSettings], Server] = Server.load, **options: Any) -> serve.Application:
    """The application with these settings. options: of Ray's deployment, such as num_replicas or autoscaling_config."""
    own: dict[str, Any] = dict(
        name="gp_jax",
        max_ongoing_requests=settings.queue + settings.max_rows,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.drain,
        health_check_timeout_s=60,
    )
    if "num_replicas" not in options:
        own["autoscaling_config"] = AUTOSCALING
    return serve.deployment(**own | options)(serve.ingress(asgi)(Replica)).bind(settings, build)


def app(args: Mapping[str, Any]) -> serve.Application:
    """What `serve run` and Ray's configuration files name. args: settings as `gp-jax serve` has them, with underscores.

    Raises: GlimpseError that names the one at fault.
    """
    known = [field.name for field in dataclasses.fields(ServerSettings) if field.name not in RAYS_OWN]
    if unknown := [name for name in args if name not in known]:
        raise GlimpseError(f"there is no setting {some(unknown)}; there are {some(known, len(known))}")
    given = {name: value.split() if name in LISTS and isinstance(value, str) else value for name, value in args.items()}
    try:
        return replicas(pydantic.TypeAdapter(ServerSettings).validate_python({"model": "", **given}))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise GlimpseError(f"{'.'.join(map(str, first['loc']))}: {one_line(first['msg'])}".removeprefix(": ")) from None
