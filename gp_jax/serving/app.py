"""The HTTP interface, OpenAI's: it checks, hands over to the answering thread, and sends what comes back."""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gp_jax.pretrained.files import BUNDLED
from gp_jax.pruning.rule import Prune
from gp_jax.serving import page
from gp_jax.serving.chat import Chat, read_chat, read_json
from gp_jax.serving.errors import ApiError, draining, too_busy
from gp_jax.serving.inbox import Busy, Draining
from gp_jax.serving.jobs import Ended, Event, Failed, Job, Started, Tokens
from gp_jax.serving.loop import Loop
from gp_jax.serving.meters import Meters
from gp_jax.serving.preparing import Preparation, deadline_of
from gp_jax.serving.replies import Reply, event
from gp_jax.serving.settings import ServerSettings

LOG = logging.getLogger("gp_jax.serving")
BODY_SECONDS = 60.0  # for a request's body to arrive
# The keep rule as `prune` of /v1/models gives it: with these numbers a client can work out what stays under other ones.
ADJUSTED = ("reduce_threshold", "max_remain_ratio", "fixed_remain_ratio", "min_remain_num", "anchor_positions")
Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """The routes of one server."""

    def __init__(self, settings: ServerSettings, loop: Loop, preparation: Preparation, meters: Meters):
        self.settings, self.loop, self.preparation, self.meters = settings, loop, preparation, meters
        self.preparing, self.started, self.numbers = 0, int(time.time()), 0
        self.max_body = settings.bytes_of("max_body")
        self.key = settings.key.encode() if settings.key else None

    def app(self) -> Starlette:
        """As an ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.answered(self.complete), methods=["POST"]),
            Route("/v1/models", self.answered(self.models)),
            Route("/v1/models/{model:path}", self.answered(self.models)),
            Route("/metrics", self.answered(self.metrics)),
            Route("/health", self.health),
            Route("/ready", self.ready),
            *page.routes(bundled=self.preparation.vlm.folder in BUNDLED.values()),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: failed})

    def answered(self, handler: Handler) -> Handler:
        """A route behind the key, whose errors are error objects."""

        async def answer(request: Request) -> Response:
            try:
                self.authorise(request)
                return await handler(request)
            except ApiError as error:
                return error.response()
            except ClientDisconnect:
                return Response(status_code=499)

        return answer

    def authorise(self, request: Request) -> None:
        """Raises: ApiError without the key. Compared in constant time."""
        if self.key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    # Routes ---------------------------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Whether the process works at all."""
        return Response(status_code=200 if self.loop.is_alive() else 503)

    async def ready(self, request: Request) -> Response:
        """Whether requests should be sent here."""
        good = self.loop.healthy and not self.loop.inbox.draining
        return JSONResponse({"ready": good}, 200 if good else 503)

    async def metrics(self, request: Request) -> Response:
        """All counters."""
        return Response(self.meters.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The one model, in a list or alone."""
        name, glimpse = self.settings.served_name, self.preparation.vlm.glimpse_config
        model = {"id": name, "object": "model", "created": self.started, "owned_by": "gp_jax", "max_model_len": self.settings.max_prompt}
        rule = Prune.from_config(glimpse) if glimpse else None
        model["prune"] = rule and {name: getattr(rule, name) for name in ADJUSTED}
        model["limits"] = dict(max_body=self.max_body, max_pictures=self.settings.max_pictures, max_new_tokens=self.settings.max_new_tokens)
        asked = request.path_params.get("model")
        if asked is None:
            return JSONResponse({"object": "list", "data": [model]})
        if asked != name:
            raise ApiError(404, f"the model {asked[:80]!r} does not exist", "model", "model_not_found")
        return JSONResponse(model)

    async def complete(self, request: Request) -> Response:
        """A chat completion, whole or as a stream."""
        deadline = deadline_of(self.settings)
        if self.loop.inbox.draining:
            raise draining()
        if self.preparing + len(self.loop.inbox) >= self.loop.inbox.limit:
            raise too_busy(self.loop.retry_after())
        self.preparing += 1
        try:
            found = read_json(await self.body(request))
            chat = read_chat(found, self.settings, self.preparation.vlm.glimpse_config)
            del found
            job = await self.preparation.job(chat, deadline)
        finally:
            self.preparing -= 1
        events: asyncio.Queue[Event] = asyncio.Queue()
        job.deliver = events.put_nowait
        try:
            self.loop.submit(job)
        except Busy:
            raise too_busy(self.loop.retry_after()) from None
        except Draining:
            raise draining() from None
        config = self.preparation.vlm.config
        reply = Reply(chat, job, self.settings.served_name, self.preparation.processor, config.eos_token_ids)
        self.numbers += 1
        number = self.numbers
        watch = asyncio.create_task(gone(request))
        handed = False
        try:
            first = await self.next(events, job, watch)
            assert isinstance(first, Started), "an answer begins with what was read"
            reply.started = first
            if chat.stream:
                handed = True
                stream = self.stream(reply, job, events, number)
                return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            reason = await self.collect(reply, job, events, watch)
            self.log(number, chat, job, reply, reason)
            return JSONResponse(reply.whole(reason))
        finally:
            watch.cancel()
            if not handed:
                self.loop.cancel(job)

    async def body(self, request: Request) -> bytes:
        """The request's body. Raises: ApiError when it is too large, or does not arrive."""
        too_large = ApiError(413, f"the body is larger than {self.max_body} bytes (--max-body)", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_body:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > self.max_body:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None
        return bytes(data)

    async def next(self, events: asyncio.Queue[Event], job: Job, watch: asyncio.Task | None = None) -> Event:
        """The next event. Raises: ApiError when the request failed; ClientDisconnect."""
        wait = asyncio.create_task(events.get())
        try:
            await asyncio.wait([wait, watch] if watch else [wait], return_when=asyncio.FIRST_COMPLETED)
            if not wait.done():
                raise ClientDisconnect
            found = wait.result()
        finally:
            wait.cancel()
        if isinstance(found, Failed):
            raise ApiError(found.status, found.message, code="timeout" if found.status == 504 else None)
        return found

    async def collect(self, reply: Reply, job: Job, events: asyncio.Queue[Event], watch: asyncio.Task) -> str:
        """Takes tokens until the end. Returns: why it ended."""
        while True:
            found = await self.next(events, job, watch)
            if isinstance(found, Ended):
                reply.growing.rest()
                return found.reason
            assert isinstance(found, Tokens), "tokens follow what was read"
            before = len(reply.growing.tokens)
            reply.growing.add(found.ids)
            reply.note(found, before)
            if reply.growing.stopped:
                return "stop"

    async def stream(self, reply: Reply, job: Job, events: asyncio.Queue[Event], number: int) -> AsyncIterator[bytes]:
        """Chunks of an answer. Its place is freed whether it ends, fails or is left."""
        reason = "stop"
        try:
            yield reply.chunk({"role": "assistant", "content": "", **reply.mask})
            while not reply.growing.stopped:
                found = await self.next(events, job)
                if isinstance(found, Ended):
                    reason = found.reason
                    break
                assert isinstance(found, Tokens), "tokens follow what was read"
                before = len(reply.growing.tokens)
                text = reply.growing.add(found.ids)
                entries = reply.note(found, before)
                if text or entries:
                    yield reply.chunk({"content": text}, entries=entries)
            rest = reply.growing.rest()
            if rest:
                yield reply.chunk({"content": rest})
            yield reply.chunk({}, reason=reason)
            yield reply.last()
            self.log(number, reply.chat, job, reply, reason)
        except ApiError as error:
            yield event(error.body)
        finally:
            self.loop.cancel(job)

    def log(self, number: int, chat: Chat, job: Job, reply: Reply, reason: str) -> None:
        """One line of sizes and times; never of contents."""
        times, started = job.times, reply.started
        assert started is not None, "a request that was answered"
        LOG.info(
            "request %d: prompt %d, pictures %d (%d known), visual %d, kept %d, new %d, %s; waited %.3f s, first token %.3f s, all %.3f s",
            *(number, job.sample.ids.size, len(job.pictures), started.seen_before, started.keep.size, int(started.keep.sum())),
            *(len(reply.growing.tokens), reason, times["begun"] - times["arrived"], times["first"] - times["arrived"]),
            time.monotonic() - times["arrived"],
        )


async def gone(request: Request) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def refused(request: Request, error: Exception) -> Response:
    """A route or a method that there is not."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None).response()


async def failed(request: Request, error: Exception) -> Response:
    """Whatever else goes wrong."""
    LOG.error("a request failed: %s", type(error).__name__)
    return ApiError(500, "the server failed to answer this request").response()


class Patient:
    """Gives up clients that do not read: nothing may wait longer than `seconds` to be sent."""

    def __init__(self, app: Any, seconds: float):
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def timed(message: Any) -> None:
            async with asyncio.timeout(self.seconds):
                await send(message)

        try:
            await self.app(scope, receive, timed if scope["type"] == "http" else send)
        except TimeoutError:
            LOG.warning("a client did not read its answer for %g s", self.seconds)
