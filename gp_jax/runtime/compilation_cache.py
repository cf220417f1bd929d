"""JAX's persistent compilation cache, on by default: programs that XLA compiled are kept on disk for later processes.

The folder is ~/.cache/gp_jax/compiled (XDG_CACHE_HOME is respected), with a subfolder per kind of CPU, because a program for one CPU may
not run on another. Beyond 4 GiB the least recently used programs are deleted. JAX_COMPILATION_CACHE_DIR names another folder, on pods it
may be at gs://. JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.

An entry that cannot be read is reported in one line and deleted, so that it is written again.

A long-running process compiles ever more shapes. A program for the CPU takes about thirty memory mappings, of which Linux allows 65,530:
`Room` drops programs before LLVM fails with "Cannot allocate memory".
"""

import contextlib
import gc
import glob
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from gp_jax.errors import one_line
from gp_jax.runtime.disk import path_of

MOST = 4 * 2**30  # bytes
WORTH = 0.02  # seconds: programs that compile faster are not cached, since JAX lists the whole folder for every write
FULL = 0.7  # share of the allowed mappings at which programs are dropped
EVERY = 128  # compilations between two checks: about 4,000 mappings


def default_folder() -> Path:
    """The cache folder for this kind of machine."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "gp_jax" / "compiled" / f"{platform.machine()}-{_cpu()}"


def _cpu() -> str:
    """A digest of the features of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return hashlib.sha256(platform.processor().encode()).hexdigest()[:8]
    abilities = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return hashlib.sha256(abilities.encode()).hexdigest()[:8]


def keep_compiled(folder: str | None = None) -> None:
    """Turns the cache on; called before anything is compiled. folder: for it; None: the default, unless JAX is configured already.

    Raises: GlimpseError for a folder that is not a path.
    """
    if not isinstance(warnings.showwarning, OneLine):
        warnings.showwarning = OneLine(warnings.showwarning)
    if folder is None and (_setting("jax_compilation_cache_dir") or not _setting("jax_enable_compilation_cache")):
        return
    if folder is None:
        try:
            folder = str(default_folder())
        except RuntimeError:  # the user has no home folder
            return
        jax.config.update("jax_compilation_cache_max_size", MOST)
    jax.config.update("jax_compilation_cache_dir", folder if "://" in folder else str(path_of(folder)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)


def _setting(name: str) -> Any:
    return getattr(jax.config, name)  # JAX adds its settings to `config` at run time: type checkers do not know them


class OneLine:
    """Replaces `warnings.showwarning`. Of JAX's warnings about entries that it cannot read or write only the first is shown, in one line;
    damaged entries are deleted, since JAX would neither use nor replace them. Other warnings are shown as before."""

    SAID = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.DOTALL)

    def __init__(self, others: Callable[..., None]):
        self.others = others
        self.told: set[str] = set()

    def __call__(self, message: Warning | str, *args: object, **kwargs: object) -> None:
        found = self.SAID.match(str(message))
        if found is None:
            self.others(message, *args, **kwargs)
            return
        (verb, program, reason), folder = found.groups(), _setting("jax_compilation_cache_dir")
        if verb not in self.told:
            self.told.add(verb)
            then = "such programs are compiled again" if verb == "reading" else "they are compiled again next time"
            what = "cannot be read" if verb == "reading" else "cannot be written"
            print(f"compiled programs in {folder} {what} (first {program}: {one_line(reason)}); {then}", file=sys.stderr)
        if folder and "://" not in folder and (verb == "reading" or _dates_entries()):
            entries = Path(folder).glob(f"{glob.escape(program)}-*-cache" if verb == "reading" else "*-cache")
            _remove(path for path in entries if not (_readable(path) if verb == "reading" else _dated(path)))


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _readable(path: Path) -> bool:
    """Whether JAX can unpack an entry."""
    try:
        data = path.read_bytes()
        if importlib.util.find_spec("zstandard") is None:
            zlib.decompress(data)
        else:
            import zstandard

            zstandard.ZstdDecompressor().decompress(data)
    except Exception:  # damaged in any way
        return False
    return True


def _dates_entries() -> bool:
    """Whether JAX records when entries are used. It does not in a folder without a maximum size, such as a user's own."""
    return _setting("jax_compilation_cache_max_size") != -1


def _dated(path: Path) -> bool:
    """Whether the time of an entry's last use is recorded. Where JAX records it, one entry without it stops all further writes."""
    return path.with_name(path.name.removesuffix("-cache") + "-atime").is_file()


def mappings() -> int:
    """Memory mappings of this process; 0 if the system does not report them."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def most_mappings() -> int:
    """How many memory mappings the system allows a process."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65530  # the kernel's default


class Room:
    """Keeps the number of programs in memory below the limit. Dropped programs are read from the disk, or compiled, when needed."""

    def __init__(self) -> None:
        self.looked = 0

    def make(self, compiled: int) -> bool:
        """Drops all programs if the limit is near. Args: compiled: programs compiled so far. Returns: whether it dropped them."""
        if compiled - self.looked < EVERY:
            return False
        self.looked = compiled
        if mappings() < FULL * most_mappings():
            return False
        jax.clear_caches()
        gc.collect()
        return True


ROOM = Room()  # one per process, shared by all engines
