"""CPU only: tell glibc to keep large buffers. XLA otherwise loses up to half its time to returning and re-faulting them.

The setting must stand in the environment before the process starts, so entry points restart themselves once.
"""

import glob
import importlib.util
import os
import platform
import sys

TUNABLES = ":".join(
    f"glibc.malloc.{setting}" for setting in ("hugetlb=1", "mmap_max=0", "trim_threshold=100000000000", "top_pad=67108864", "arena_max=1")
)


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


def keep_memory() -> None:
    """Restarts the interpreter with the allocator settings, unless they (or any GLIBC_TUNABLES) are set or JAX is not on CPU."""
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    if not glibc or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ or not _on_cpu():
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
