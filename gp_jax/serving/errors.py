"""Errors as OpenAI's error objects."""

from typing import Any

from starlette.responses import JSONResponse

from gp_jax.errors import printable

SHOWN = 500  # characters of a message
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that says why there is none. param: the field at fault; code: a word for programs; retry: seconds to wait."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, printable(message, SHOWN), param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As an HTTP response."""
        headers = {"Retry-After": str(self.retry)} if self.retry is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def too_busy(retry: int) -> ApiError:
    """The queue is full."""
    return ApiError(429, "the server is busy: its queue is full", code="queue_full", retry=retry)


def draining() -> ApiError:
    """The server is about to end."""
    return ApiError(503, "the server is shutting down", code="draining", retry=5)
