"""Memory settings that entry points make before anything else.

On CPU, glibc is set to keep freed buffers: otherwise XLA spends up to half its time on page faults when it allocates them again. XLA is set
to compile without its MLIR emitters, which hold 300 MB for a model of any size; without them steps take as long, and compiling the mid
benchmark takes 10 s of CPU more. Both settings are read at process start, so the process re-executes itself once.
"""

import glob
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Buffers of 32 MiB and more (the maximum that glibc accepts here) get mappings of their own and are returned when they are freed; in the
# heap they would leave holes (100 MiB after a request of the 0.5 B benchmark). Requests and training steps are not slower with it.
MAPPED = 32 * 2**20
TUNABLES = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", f"mmap_threshold={MAPPED}", "trim_threshold=100000000000", "top_pad=67108864", "arena_max=1")
)
EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"  # ignored by versions of XLA that do not know it


# Packages with which JAX uses another device than the CPU, and the device files that must exist. (libtpu without a TPU is only a compiler.)
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
    """PathFinder, except that it does not find torch."""

    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


def keep_memory() -> None:
    """Hides torch, which transformers would import if it is installed (300 MB, and nothing here needs it). Then re-executes the process
    with the settings above, unless GLIBC_TUNABLES is set or JAX does not run on CPU."""
    sys.meta_path[:] = [_NoTorch if finder is PathFinder else finder for finder in sys.meta_path]
    if importlib.util.find_spec("libtpu") and _on_cpu():
        os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is here as a compiler only; JAX would look for a TPU and print many warnings
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    if not glibc or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ or not _on_cpu():
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    flags = os.environ.get("XLA_FLAGS", "")
    if EMITTERS.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {EMITTERS}".strip()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
