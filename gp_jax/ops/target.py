"""Which platforms the programs that are being traced are for.

Ordinarily that is the backend of this machine. Programs for machines that are not here say so with `targeting`; a program that must
lower for any of several platforms (`jax.jit` of `inference_fn`, `jax.export`) may not ask at trace time at all: `attention` leaves
its choice to the lowering then.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "tpu", "cuda")  # names of `jax.export`; a backend's own name for the last is "gpu"
_target: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("target", default=())


@contextlib.contextmanager
def targeting(*platforms: str) -> Iterator[None]:
    """Programs traced inside are for these platforms, whatever the machine that traces them has."""
    token = _target.set(platforms)
    try:
        yield
    finally:
        _target.reset(token)


def targets() -> tuple[str, ...]:
    """The platforms that programs traced now are for: at least one."""
    return _target.get() or (jax.default_backend(),)
