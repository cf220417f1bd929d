"""The command `gp-jax doctor`."""

import glob
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from gp_jax.errors import one_line, reason, some

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "huggingface_hub", "numpy", "tensorflow-datasets", "orbax-checkpoint")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # of processors, that decide how fast products are
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Doctor:
    """Say what this machine has for gp_jax, what is missing, and how to install it."""

    offline: bool = False
    """Do not try to reach the Hugging Face Hub."""


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB"


def versions() -> str:
    """Python and packages."""

    def one(name: str) -> str:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{name} missing"

    return f"Python {platform.python_version()}, {', '.join(map(one, PACKAGES))}"


def processor() -> str:
    """Kind, cores and vector units."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    facts = {name.strip().lower(): value.strip() for name, _, value in reversed(lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    units = [unit for unit in FEATURES if unit in (facts.get("flags") or facts.get("features") or "").split()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores" + (f", {' '.join(units)}" if units else "")


def memory() -> str:
    """Free and total."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return f"{gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} in all"
    needs = "7B in bfloat16 needs about 20 GiB" if free < 20 * 2**30 else "enough for 7B in bfloat16"
    return f"{gib(free)} free of {gib(total)}; {needs}"


def devices() -> str:
    """What JAX computes on."""
    import jax

    found = jax.devices()
    kinds = sorted({device.device_kind for device in found})
    return f"{len(found)} x {some(kinds)}, backend {jax.default_backend()}"


def accelerator(name: str, files: tuple[str, ...], packages: tuple[str, ...], install: str) -> str:
    """What is here of the hardware and of the software for it. files: of its devices; install: how to get the software."""
    hardware = any(glob.glob(pattern) for pattern in files)
    software = [package for package in packages if importlib.util.find_spec(package)]
    if hardware:
        return f"{name} found" + (f", {software[0]} installed" if software else f", but JAX cannot use it: {install}")
    return f"no {name} here" + (f"; {software[0]} is installed" if software else f"; on a machine with one: {install}")


def tpu() -> str:
    """TPU and its compiler."""
    compiler = "" if importlib.util.find_spec("libtpu") else "; gp-jax compile needs its compiler: pip install libtpu"
    return accelerator("TPU", ("/dev/accel*", "/dev/vfio/[0-9]*"), ("libtpu",), 'pip install "gp_jax[tpu]"') + compiler


def cuda() -> str:
    """NVIDIA GPU and JAX's plugin."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return accelerator("NVIDIA GPU", ("/dev/nvidia[0-9]*", "/dev/dxg"), plugins, 'pip install "gp_jax[cuda]"')


def cache() -> str:
    """The folder of compiled programs."""
    from gp_jax.runtime.compilation_cache import MOST, default_folder

    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false"):
        return "off (JAX_ENABLE_COMPILATION_CACHE): every process compiles anew"
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = Path(given) if given else default_folder()
    if "://" in str(folder):
        return str(folder)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with tempfile.TemporaryFile(dir=there):  # raises where it cannot be written
        held = sum(path.stat().st_size for path in folder.glob("*-cache")) if folder.is_dir() else 0
    return f"{folder}, {gib(held)} of at most {gib(MOST)}, {gib(shutil.disk_usage(there).free)} free on its disk"


def hub(offline: bool) -> str:
    """The Hugging Face Hub: folder, token, and whether it answers."""
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token (only gated models need one: hf auth login)"
    where = f"files in {constants.HF_HUB_CACHE}, {token}"
    if offline or constants.HF_HUB_OFFLINE:
        return f"{where}; offline"
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS):
            return f"{where}; {constants.ENDPOINT} answers"
    except OSError as error:
        said = one_line(getattr(error, "reason", error))
        return f"{where}; {constants.ENDPOINT} does not answer ({said}): use model folders, a proxy (HTTPS_PROXY), or HF_HUB_OFFLINE=1"


def bundled() -> str:
    """The bundled model and the configurations."""
    from gp_jax.config.files import shipped
    from gp_jax.pretrained.files import ADAPTER_WEIGHTS, BUNDLED, BUNDLED_GLIMPSES, BUNDLED_TUNED

    weights = {name: folder / "model.safetensors" for name, folder in BUNDLED.items()}
    weights |= {name: BUNDLED_GLIMPSES[name] / ADAPTER_WEIGHTS[0] for name in BUNDLED_TUNED}
    missing = [name for name, path in weights.items() if not path.is_file()]
    if missing or not shipped():
        raise OSError(f"missing: {some(missing or ['configurations'])}; install gp_jax again")
    return f"models {some(weights)}, {len(shipped())} configurations (gp-jax configs)"


def run(args: Doctor) -> int:
    """Runs `gp-jax doctor`. Returns: 1 when something does not work that gp_jax needs; TPU, GPU and Hub are not needed."""
    from gp_jax import __version__

    print(f"gp_jax {__version__} in {Path(__file__).resolve().parents[1]}, {sys.executable}")
    checks: list[tuple[str, Callable[[], str], bool]] = [
        ("packages", versions, True),
        ("processor", processor, True),
        ("memory", memory, False),
        ("devices", devices, True),
        ("TPU", tpu, False),
        ("CUDA", cuda, False),
        ("compiled", cache, True),
        ("bundled", bundled, True),
        ("Hub", lambda: hub(args.offline), False),
    ]
    broken = []
    for name, check, needed in checks:
        try:
            said = check()
        except Exception as error:  # a check may fail in any way: that is what is asked here
            said = f"does not work: {reason(error)}"
            broken += [name] * needed
        print(f"{name:10} {said}", flush=True)
    print(f"not in order: {', '.join(broken)}" if broken else "everything that gp_jax needs is here")
    return int(bool(broken))


def parse(argv: list[str]) -> Doctor:
    """Reads the command line."""
    return tyro.cli(Doctor, args=argv, prog="gp-jax doctor", config=(tyro.conf.HelptextFromCommentsOff,))
