"""Reads facts from the text of a compiled program: bytes sent between chips, attention kernels, the largest array, loops."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
BITS = {"pred": 8, "token": 0, "opaque": 0}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(calls|body|condition|to_apply|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
NO_ARRAY = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "custom-call", "copy-start", "copy-done")


def array_bytes(kind: str, sizes: str) -> int:
    """Bytes of an array, such as "bf16", "4,128"; types below a byte count in bits."""
    bits = BITS[kind] if kind in BITS else int(match.group()) if (match := re.search(r"\d+", kind)) else 0
    count = 1
    for size in sizes.split(","):
        count *= int(size) if size else 1
    return count * bits // 8


def type_bytes(text: str) -> int:
    """Bytes of a type; of a tuple, of all its elements together."""
    return sum(array_bytes(*found) for found in ARRAY.findall(text))


@dataclass(frozen=True)
class Facts:
    """Facts about one run of a program on one chip. A loop of unknown length counts once."""

    collectives: dict[str, int]  # kind -> bytes of the operands
    splash: int  # splash attention kernels
    kernels: int  # kernels of any kind
    largest: int  # bytes of the largest array that is computed, inputs excluded
    squares: int  # bytes of the largest array of rows x rows
    loops: tuple[int, ...]  # known lengths of loops; XLA's cost analysis counts their bodies once


@dataclass
class _Computation:
    lines: list[tuple[str, str, str, str]] = field(default_factory=list)  # name, type, operation, rest
    calls: list[tuple[str, int]] = field(default_factory=list)  # computation, times


def _read(text: str) -> tuple[dict[str, _Computation], str, set[str]]:
    """Computations by name, the entry's name, and those whose arrays are never stored (bodies of fusions, reducers)."""
    found: dict[str, _Computation] = {}
    inner: set[str] = set()
    entry, current = "", None
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = found.setdefault(head.group(2), _Computation())
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (match := INSTRUCTION.match(line)):
            name, kind, operation, rest = match.groups()
            current.lines.append((name, kind, operation, rest))
            trips = int(known.group(1)) if operation == "while" and (known := TRIPS.search(rest)) else 1
            for attribute, many, one in CALLED.findall(rest):
                for callee in re.findall(r"[\w.\-]+", many or one):
                    current.calls.append((callee, trips))
                    if (attribute == "to_apply" and operation != "call") or operation == "fusion":
                        inner.add(callee)
    return found, entry, inner


def read(text: str, rows: Mapping[int, int] | None = None) -> Facts:
    """Reads the facts of a compiled program.

    Args: text: `compiled.as_text()`; rows: length of a sequence -> elements; `Facts.squares` counts arrays of length x length with more.
    """
    computations, entry, inner = _read(text)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for callee, trips in computations[name].calls if name in computations else ():
            visit(callee, count * trips)

    visit(entry, 1)
    sizes = {name: type_bytes(kind) for c in computations.values() for name, kind, _, _ in c.lines}
    sent: dict[str, int] = defaultdict(int)
    splash = kernels = largest = squares = 0
    for name, computation in computations.items():
        for own, kind, operation, rest in computation.lines:
            base = operation.removesuffix("-start")
            if base in COLLECTIVES:
                operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
                sent[base] += times[name] * sum(sizes.get(operand, 0) for operand in operands)
            if operation == "custom-call" and '"tpu_custom_call"' in rest:
                kernels += 1
                splash += "splash" in own or "splash" in rest
            if name in inner or operation in NO_ARRAY:
                continue
            for array in ARRAY.findall(kind):
                size, shape = array_bytes(*array), [int(side) for side in array[1].split(",") if side]
                largest = max(largest, size)
                if any(shape.count(n) >= 2 and math.prod(shape) > most for n, most in (rows or {}).items()):
                    squares = max(squares, size)
    loops = tuple(int(n) for n in TRIPS.findall(text) if int(n) > 1)
    return Facts(dict(sent), splash, kernels, largest, squares, loops)
