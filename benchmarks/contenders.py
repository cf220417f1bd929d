"""Contenders of an interleaved run: each is a process of its own that answers when it is asked, so that machine noise meets all alike.

A worker prints one JSON object per line: first what start-up cost, then the seconds per stage of every request it is asked for, then,
when its input ends, its memory. The parent asks one contender at a time, in turns.
"""

import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def resident(field: str = "VmRSS") -> float:
    """MiB of this process: VmRSS now, VmHWM at most since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> float:
    """Gives free memory back to the system and forgets the peak so far. Returns: MiB resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def serve(ready: dict, request: Callable[[], dict[str, float]], extra: Callable[[], dict] = dict) -> None:
    """A worker's side: announces itself, answers until its input ends, reports memory.

    Args: request: one request, seconds per stage; extra: what else to report at the end.
    """
    print(json.dumps(ready), flush=True)
    base = None
    for _ in sys.stdin:
        if base is None:
            base = reset_peak()
        print(json.dumps(request()), flush=True)
    print(json.dumps(dict(resident=base or resident(), peak=resident("VmHWM")) | extra()), flush=True)


class Contender:
    """The parent's side of one worker: `python -m MODULE worker ARGS`."""

    def __init__(self, name: str, module: str, *args: object, **environment: str):
        self.name, self.results = name, []
        command = [sys.executable, "-m", module, "worker", *map(str, args)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.ready = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: the process ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self) -> dict[str, float]:
        """One request. Returns: seconds per stage."""
        self.process.stdin.write("\n")
        self.results.append(self._read())
        return self.results[-1]

    def end(self) -> dict:
        """Ends the process. Returns: what it reports."""
        self.process.stdin.close()
        report = self._read()
        self.process.wait()
        return report

    def median(self, stage: str) -> float:
        """Seconds of a stage."""
        return statistics.median(result[stage] for result in self.results)

    def spread(self, stage: str) -> float:
        """Half the distance between the quartiles, as a share of the median: how noisy a stage was."""
        values = [result[stage] for result in self.results]
        if len(values) < 2 or not statistics.median(values):
            return 0.0
        low, _, high = statistics.quantiles(values, n=4)
        return (high - low) / 2 / statistics.median(values)


def interleave(contenders: Sequence[Contender], rounds: int, warm: int = 1, progress: Callable[[str], None] = lambda text: None) -> None:
    """Asks everybody once per round, every round beginning with another one. The first `warm` rounds are forgotten."""
    for number in range(warm + rounds):
        turn = number % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            progress(contender.name)
            contender.ask()
            if number < warm:
                contender.results.clear()
