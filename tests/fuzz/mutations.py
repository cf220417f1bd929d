"""What happens to good inputs."""

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63,
    10**30,
    -5.0,
    0.5,
    1e-30,
    1e30,
    float("nan"),
    float("inf"),
    -0.0,
)
TEXTS = (
    "",
    " ",
    "x",
    "a" * 3000,
    "\ud800",
    "\0",
    "\x1b]0;x\x07",
    "~nobody-here/x",
    "../../etc/passwd",
    "/dev/zero",
    "-1",
    "true",
    "{{",
    "\u202e",
)
OTHERS = (None, True, False, [], {}, [[]], [None], {"a": 1}, [1e9, -1], [[1, 2], [3]])


def any_value(rng: random.Random) -> Any:
    """A JSON value that nobody asked for."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(NUMBERS)
    if kind < 0.7:
        return rng.choice(TEXTS)
    if kind < 0.95:
        return copy.deepcopy(rng.choice(OTHERS))
    return _deep(rng.choice((50, 500, 100_000)))


class _deep(str):
    """Stands for lists nested so deep that they can only be written as text."""

    def __new__(cls, depth: int) -> "_deep":
        made = super().__new__(cls, f"@{depth}@")
        made.depth = depth
        return made


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in inner for found in ((*path, key), *places(one, (*path, key)))]


def changed(rng: random.Random, value: Any, times: int = 1) -> Any:
    """A JSON value with a few places changed, removed, added or swapped."""
    value = copy.deepcopy(value)
    for _ in range(times):
        found = places(value)
        if not found:
            return any_value(rng)
        *above, last = rng.choice(found)
        node = value
        for key in above:
            node = node[key]
        action = rng.random()
        if action < 0.12:
            del node[last]
        elif action < 0.2 and isinstance(node, dict):
            node[rng.choice((*TEXTS, *map(str, node)))] = any_value(rng)
        elif action < 0.3 and isinstance(node[last], int | float) and not isinstance(node[last], bool):
            node[last] = node[last] * rng.choice((-1, 2, 0.5, 1000, 10**6))
        elif action < 0.36:
            node[last] = [copy.deepcopy(node[last])] * rng.choice((0, 1, 2, 100))
        else:
            node[last] = any_value(rng)
    return value


def as_json(rng: random.Random, value: Any) -> bytes:
    """Text of a JSON value, now and then damaged itself."""
    text = json.dumps(value, default=str)
    for depth in (50, 500, 100_000):
        text = text.replace(f'"@{depth}@"', "[" * depth + "]" * depth)
    data = text.encode("utf-8", "surrogatepass")
    return flipped(rng, data) if rng.random() < 0.1 else data


def flipped(rng: random.Random, data: bytes, most: int = 8) -> bytes:
    """Bytes changed, cut out, doubled, cut off, or numbers among them made extreme."""
    data = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if not data:
            return rng.randbytes(rng.randint(0, 40))
        at, action = rng.randrange(len(data)), rng.random()
        if action < 0.4:
            data[at] = rng.randrange(256)
        elif action < 0.5:
            data[at] ^= 1 << rng.randrange(8)
        elif action < 0.6:
            del data[at : at + rng.randint(1, 64)]
        elif action < 0.7:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        elif action < 0.75:
            del data[at:]
        elif action < 0.85:
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 65536)))
        elif action < 0.95:
            data[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice((0, 1, 0x7FFF, 0x8000, 0xFFFF)))
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(data)
