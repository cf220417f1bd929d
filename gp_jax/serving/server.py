"""Starts a server: model, programs, answering thread, then the port; and ends it."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax
import uvicorn

from gp_jax.errors import GlimpseError, one_line
from gp_jax.pruning.plan import Plan
from gp_jax.pruning.rule import Prune
from gp_jax.runtime.progress import bar as progress_bar
from gp_jax.serving.app import Api, Patient
from gp_jax.serving.jobs import Event, Job
from gp_jax.serving.lengths import Lengths, lengths_of
from gp_jax.serving.loop import Loop
from gp_jax.serving.meters import Meters
from gp_jax.serving.preparing import Preparation
from gp_jax.serving.settings import ServerSettings
from gp_jax.serving.vision_cache import VisionCache
from gp_jax.serving.warm_up import warm_up
from gp_jax.sharding import make_mesh, mesh_sizes
from gp_jax.vlm import GlimpseVLM

LOG = logging.getLogger("gp_jax.serving")
CONNECTIONS = 2048  # at once; more are answered 503


def plans_of(vlm: GlimpseVLM, methods: Sequence[str]) -> frozenset[Plan]:
    """The plans that requests may have: none, the glimpse, and what --methods names. Raises: GlimpseError for an unknown method."""
    wanted = [Prune.from_config(vlm.glimpse_config)] if vlm.glimpse_config else []
    wanted += [Prune(method=method, fixed_remain_ratio=0.5) for method in methods]
    return frozenset({(), *(vlm.resolve_shortest(prune).plan for prune in wanted)})


def mesh_of(text: str) -> Any:
    """The mesh of --mesh, None: one device. Raises: GlimpseError that names it."""
    if not text:
        return None
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in sizes or not number.removeprefix("-").isdigit():
            raise GlimpseError(f"--mesh {text}: must look like data=1,fsdp=1,tensor=4")
        sizes[name] = int(number)
    devices = jax.local_devices()
    return make_mesh(*mesh_sizes(**sizes, devices=len(devices)), devices=devices)


@dataclass
class Server:
    """A server that is ready to listen."""

    settings: ServerSettings
    vlm: GlimpseVLM
    lengths: Lengths
    loop: Loop
    api: Api

    @classmethod
    def build(
        cls, settings: ServerSettings, vlm: GlimpseVLM, bar: Callable[[list], Iterable] = iter, lengths: Lengths | None = None
    ) -> "Server":
        """Compiles every program. bar: wraps a list of steps; lengths: None: as the settings say. Raises: GlimpseError."""
        itemsize = vlm.model.decoder.embed_tokens.dtype.itemsize
        rows = vlm.glimpse_config.rows if vlm.glimpse_config else 0
        lengths = lengths or lengths_of(settings, vlm.config, itemsize, rows)
        plans = plans_of(vlm, settings.methods)
        warm_up(vlm.engine, lengths, sorted(plans, key=str), settings.max_pictures, bar)
        meters, cache = Meters(settings.served_name), VisionCache(settings.bytes_of("vision_cache"))
        loop = Loop(vlm.engine, lengths, cache, meters, settings.gap, settings.visit, settings.queue)
        return cls(settings, vlm, lengths, loop, Api(settings, loop, Preparation(vlm, settings, loop.reader, plans), meters))

    @classmethod
    def load(cls, settings: ServerSettings, progress: bool = False) -> "Server":
        """Reads the model and compiles every program. Raises: GlimpseError."""
        options: dict[str, Any] = dict(dtype=settings.dtype, mesh=mesh_of(settings.mesh), adapter=settings.adapter, progress=progress)
        vlm = GlimpseVLM.from_pretrained(settings.model, settings.glimpse, **options)
        return cls.build(settings, vlm, progress_bar("compiling", "step", progress))

    @property
    def asgi(self) -> Any:
        """The application."""
        return Patient(self.api.app(), self.settings.timeout)

    def run(self) -> None:
        """Listens until SIGTERM or SIGINT; running answers are finished first."""
        listener = listen(self.settings)
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            self.asgi,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(self.settings.drain)),
        )
        place = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"gp-jax serve: {self.settings.served_name}; its page is at {place}/ and OpenAI's interface at {place}/v1", flush=True)
        Listening(config, self.loop).run(sockets=[listener])
        self.loop.stop()
        self.loop.join(10)


class Listening(uvicorn.Server):
    """uvicorn's server, which drains on a signal and then ends as if all were well."""

    def __init__(self, config: uvicorn.Config, loop: Loop):
        super().__init__(config)
        self.answers = loop

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Delivers answers in this thread's event loop."""
        begin(self.answers)
        await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server; they are not raised again behind it, so that the process ends with status 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes no more requests. A second signal does not wait for answers."""
        if not self.answers.inbox.draining:
            print("gp-jax serve: finishing answers, then ending", file=sys.stderr, flush=True)
        self.answers.drain()
        super().handle_exit(sig, frame)


def begin(answers: Loop) -> None:
    """Starts the answering thread, which delivers answers in the event loop that this is called in."""
    own = asyncio.get_running_loop()

    def deliver(batch: Sequence[tuple[Job, Event]]) -> None:
        for job, event in batch:
            job.deliver(event)

    def post(batch: Sequence[tuple[Job, Event]]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            own.call_soon_threadsafe(deliver, batch)

    answers.post = post
    answers.start()


def listen(settings: ServerSettings) -> socket.socket:
    """Opens the port. Raises: GlimpseError that names it."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        raise GlimpseError(f"--host {settings.host} --port {settings.port}: cannot listen there ({one_line(error)})") from error
