"""Runs inputs in a process of their own and says which of them did more than fail well."""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 5  # of processor time
PATIENCE = 40  # seconds without a word from the process: it hangs in native code
SPARE = 200 * 10**6  # bytes beside twice the input
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "builtins.input",
    "pty.spawn",
)

WORKERS = ("template_worker", "pattern_worker")  # which run what strangers wrote, and die of bad things


class TooSlow(BaseException):
    """Nothing that catches errors may catch it."""


@dataclass(frozen=True)
class Case:
    """An input."""

    target: str
    seed: int
    number: int

    def __str__(self) -> str:
        return f"{self.target}:{self.seed}:{self.number}"


class Guard:
    """Notes what no input may bring about."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in FORBIDDEN and not any(worker in repr(args) for worker in WORKERS):
            self.seen.append(f"{event} {args!r:.120}")
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike) and args[2] & (os.O_WRONLY | os.O_RDWR):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not path.startswith((tempfile.gettempdir(), "/dev/null")):
                self.seen.append(f"writes {path}")


def peak_memory() -> int:
    """Most bytes that were resident since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak() -> bool:
    """Whether the system counts anew from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def attempt(case: Case, guard: Guard) -> str | None:
    """Makes and tries an input. Returns: what is wrong with how it ended."""
    from gp_jax.errors import GlimpseError
    from tests.fuzz.targets import TARGETS, generator

    guard.seen.clear()
    with tempfile.TemporaryDirectory(prefix="gp_jax_fuzz.") as scratch:
        try:
            call, size = TARGETS[case.target].make(generator(case.target, case.seed, case.number), Path(scratch))
        except Exception:
            return f"the fuzzer itself: {traceback.format_exc(limit=-3)}"
        measured = reset_peak()
        before, wrong = peak_memory() if measured else 0, None
        guard.on = True
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            call()
        except GlimpseError as error:
            text = str(error)
            if not text or len(text) > 2500 or any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
                wrong = f"a message that is no line to read: {text[:200]!r}"
        except TooSlow:
            wrong = f"more than {SECONDS} s: {traceback.format_exc(limit=-3)}"
        except BaseException:
            wrong = traceback.format_exc(limit=-6)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            guard.on = False
        used = peak_memory() - before if measured else 0
    if used > 2 * size + SPARE and not wrong:
        wrong = f"{used >> 20} MiB for an input of {size} bytes"
    return "; ".join(guard.seen) or wrong


def child() -> None:
    """Tries the inputs named on standard input, a line each; says a line before and after each."""
    sys.path.insert(0, str(ROOT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def too_slow(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, too_slow)
    from tests.fuzz.targets import prepare

    prepare()
    limit = 4 * 10**9 + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # an input must not take the machine down
    guard, words = Guard(), os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    print("ready", file=out, flush=True)
    for line in words:
        target, seed, number = line.split(":")
        wrong = attempt(Case(target, int(seed), int(number)), guard)
        print(json.dumps(wrong), file=out, flush=True)


class Child:
    """The process that tries inputs."""

    def __init__(self) -> None:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "tests.fuzz", "--child"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read(300)

    def read(self, patience: float) -> str | None:
        """A line; None when none comes."""
        if not select.select([self.process.stdout], [], [], patience)[0]:
            return None
        return self.process.stdout.readline()

    def end(self) -> int:
        """Kills it. Returns: its exit status."""
        self.process.kill()
        return self.process.wait()

    def tries(self, case: Case) -> str | None:
        """As `attempt`. A process that died or hangs is ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{case}\n")
            self.process.stdin.flush()
        line = self.read(PATIENCE)
        if line:
            return json.loads(line)
        status = None if line is None else self.process.wait()
        self.end()
        return f"no word for {PATIENCE} s" if status is None else f"the process died ({status})"


def failures(cases: Iterable[Case], until: float | None = None) -> Iterator[tuple[Case, str | None]]:
    """Every input and what is wrong with it (None: nothing), up to a point in time (`time.monotonic`)."""
    process = Child()
    try:
        for case in cases:
            if until is not None and time.monotonic() > until:
                return
            if process.process.poll() is not None:
                process = Child()
            yield case, process.tries(case)
    finally:
        process.end()
