"""A lock, so that one process at a time writes to a folder. It is released when its holder ends, however it ends.

Locally it is the system's lock on a file. Object stores and some shared file systems have no locks: there the holder rewrites a mark every
few seconds, and a mark that is not rewritten for a while is ignored. Two processes that start within the same second may both see no mark.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from gp_jax.errors import GlimpseError, printable
from gp_jax.runtime.disk import write_text, writing

FILE = ".lock"
MARK = ".writing"  # used if the file system has no locks
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
BEAT = 10.0  # seconds between two writes of a mark
DEAD = 3  # missed writes after which a mark is ignored


@contextlib.contextmanager
def only_one(folder: epath.Path | Path, what: str, local: bool | None = None) -> Iterator[None]:
    """Holds the lock of a folder. The folder is created, and removed again if nothing was written to it.

    Args: what: the writer for messages, e.g. "train.py"; local: whether the file system has locks; default: unless it is a URI.
    Raises: GlimpseError when another process holds it, or when the folder cannot be written.
    """
    local = "://" not in str(folder) if local is None else local
    with writing(folder), contextlib.ExitStack() as stack:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(_system_lock(Path(folder) / FILE, what) if local else _beating(epath.Path(folder) / FILE, what))
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            stack.enter_context(_beating(epath.Path(folder) / MARK, what))
        if made and local:
            stack.callback(_remove_empty, Path(folder))
        held = stack.pop_all()
    with held:
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [FILE]:
            (folder / FILE).unlink()
            folder.rmdir()


@contextlib.contextmanager
def _system_lock(path: Path, what: str) -> Iterator[None]:
    with path.open("a+") as file:  # the lock is released when the file is closed or the process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _refused(path, file.read(200) or what) from error
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # its folder was removed in the meantime
            raise _refused(path, what)
        file.truncate(0)
        file.write(f"{what}, process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def _beating(path: epath.Path, what: str) -> Iterator[None]:
    mine = {"who": f"{what}, process {os.getpid()} on {socket.gethostname()}", "id": uuid.uuid4().hex}
    other, deadline = _mark(path), time.monotonic() + BEAT * DEAD
    if other is not None and time.time() - other["time"] > 20 * BEAT * DEAD:
        other = None  # from an old run; the clocks of hosts differ by less
    while other is not None and time.monotonic() < deadline:  # a live holder rewrites its mark
        time.sleep(BEAT / 10)
        now = _mark(path)
        if now is not None and now != other:
            raise _refused(path, now["who"])
        other = now
    stop = threading.Event()

    def beat() -> None:
        write_text(path, json.dumps(mine | {"time": time.time()}))  # atomic: an incomplete mark would be ignored

    def go_on() -> None:
        while not stop.wait(BEAT):
            with contextlib.suppress(GlimpseError):  # the store may be unreachable for a moment
                beat()

    beat()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if (left := _mark(path)) is not None and left["id"] == mine["id"]:
            path.unlink(missing_ok=True)


def _mark(path: epath.Path) -> dict | None:
    """The holder of the lock and the time of its mark; None: no mark, or an unreadable one."""
    try:
        mark = json.loads(path.read_text())
        return {"who": str(mark["who"]), "id": str(mark["id"]), "time": float(mark["time"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refused(path: epath.Path | Path, who: str) -> GlimpseError:
    return GlimpseError(f"{path.parent}: {printable(who, 200)} is writing there; wait for it, or choose another --out")
