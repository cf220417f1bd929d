"""The platforms for which programs are traced.

By default that is the backend of this machine. `targeting` sets others, e.g. to compile ahead for a TPU. A program that is lowered for
several platforms (`jax.jit` of `inference_fn`, `jax.export`) cannot depend on the platform at trace time: `attention` then chooses its
kernel at lowering.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "tpu", "cuda")  # names of `jax.export`; a backend's own name for the last is "gpu"
_target: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("target", default=())


@contextlib.contextmanager
def targeting(*platforms: str) -> Iterator[None]:
    """Programs that are traced inside are for these platforms, on any machine."""
    token = _target.set(platforms)
    try:
        yield
    finally:
        _target.reset(token)


def targets() -> tuple[str, ...]:
    """The platforms that programs traced now are for: at least one."""
    return _target.get() or (jax.default_backend(),)
