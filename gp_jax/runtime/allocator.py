"""What entry points do for memory before anything else.

On CPU glibc is told to keep freed buffers (XLA otherwise loses up to half its time to returning and re-faulting them), and XLA to compile
without its MLIR emitters, which keep 300 MB for a model of any size (steps take as long, compiling the mid benchmark some 10 s of CPU
longer). Both must stand in the environment before the process starts, so entry points restart themselves once.
"""

import glob
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# From 32 MiB on (the most that glibc takes here) buffers are mappings of their own and go back when they are freed: in the heap they leave
# holes that stay (100 MiB of a request of the 0.5 B benchmark, which is no slower for it, nor is a training step).
MAPPED = 32 * 2**20
TUNABLES = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", f"mmap_threshold={MAPPED}", "trim_threshold=100000000000", "top_pad=67108864", "arena_max=1")
)
EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"  # an XLA that does not know it ignores it


# What makes JAX leave the CPU: a package, and the devices it drives (libtpu alone is a compiler).
PLUGINS = {
    "libtpu": ("/dev/accel*", "/dev/vfio/[0-9]*"),
    "jax_cuda12_plugin": ("/dev/nvidia*", "/dev/dxg"),
    "jax_cuda13_plugin": ("/dev/nvidia*", "/dev/dxg"),
    "jax_rocm7_plugin": ("/dev/kfd",),
}


def _on_cpu() -> bool:
    """Whether JAX will run on CPU, judged without starting it."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted:
        return wanted.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) and any(glob.glob(device) for device in devices) for name, devices in PLUGINS.items())


class _NoTorch(PathFinder):
    """Finds what PathFinder finds, but torch."""

    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


def keep_memory() -> None:
    """Hides torch, which transformers would import where it is installed (300 MB that nothing here needs), and restarts the
    interpreter with the settings above, unless GLIBC_TUNABLES are set or JAX is not on CPU."""
    sys.meta_path[:] = [_NoTorch if finder is PathFinder else finder for finder in sys.meta_path]
    if importlib.util.find_spec("libtpu") and _on_cpu():
        os.environ["JAX_PLATFORMS"] = "cpu"  # installed as a compiler: looking for its TPU fails after a page of warnings
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    if not glibc or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ or not _on_cpu():
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    flags = os.environ.get("XLA_FLAGS", "")
    if EMITTERS.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {EMITTERS}".strip()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
