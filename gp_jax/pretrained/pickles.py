"""A pickle interpreter for the output of `torch.save` only: dicts, lists, tuples, strings, numbers, and objects that its caller allows.

With Python's own unpickler a file can change objects that were checked already, and make it allocate memory by a number in the file. Here
every opcode that is not in the table is refused, other objects are made by the caller's functions only, and memory is bounded by the size
of the file.
"""

import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

MOST_BYTES = 4 << 20
MOST_STEPS = 1 << 18  # opcodes; a tensor takes about fifty
MOST_LETTERS = 256  # characters in the name of a module or class


class Refused(ValueError):
    """The file is damaged or has unsupported content."""


class Global:
    """A function of the caller, wrapped for the stack."""

    __slots__ = ("call",)

    def __init__(self, call: Callable):
        self.call = call


class Machine:
    """Runs one pickle.

    Args: find: name of a module and of a class in it -> the function that makes such objects, or a value in place of the class; fetch:
        persistent id -> its value.
    """

    def __init__(self, data: bytes, find: Callable[[str, str], Callable], fetch: Callable[[Any], Any]):
        if len(data) > MOST_BYTES:
            raise Refused(f"its list of tensors is larger than {MOST_BYTES >> 20} MiB")
        self.data, self.place, self.find, self.fetch = data, 0, find, fetch
        self.stack: list = []
        self.below: list[list] = []  # stacks under the marks
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value. Raises: Refused."""
        for _ in range(MOST_STEPS):
            code = self.take(1)
            if code == b".":
                return self.pop()
            if code not in ACTIONS:
                known = next((op for op in pickletools.opcodes if op.code == code.decode("latin-1")), None)
                raise Refused(f"it holds the opcode {known.name if known else code.hex()}, which torch.save does not write")
            ACTIONS[code](self)
        raise Refused(f"it takes more than {MOST_STEPS} steps to read")

    def take(self, count: int) -> bytes:
        """The next bytes of the file."""
        if count > len(self.data) - self.place:
            raise Refused("it is cut short")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, form: str) -> Any:
        """A number of fixed size."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> str:
        """A string with its length in front."""
        return self.take(self.number(form)).decode("utf-8")

    def line(self) -> str:
        """A text up to the end of its line."""
        end = self.data.find(b"\n", self.place, self.place + MOST_LETTERS + 1)
        if end < 0:
            raise Refused("it holds a name without end")
        return self.take(end + 1 - self.place)[:-1].decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise Refused("it takes more values than it holds")
        return self.stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> list:
        """The values behind the last mark."""
        if not self.below:
            raise Refused("it takes more values than it holds")
        values, self.stack = self.stack, self.below.pop()
        return values

    def several(self, count: int) -> tuple:
        """The newest values as a tuple."""
        return tuple(self.pop() for _ in range(count))[::-1]

    def keep(self, index: int) -> None:
        if index >= len(self.data):
            raise Refused("it numbers a value beyond its own length")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused("it refers to a value that it does not hold")
        self.push(self.memo[index])

    def allowed(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("it names a class by something that is not a text")
        found = self.find(module, name)
        self.push(Global(found) if callable(found) else found)

    def make(self) -> None:
        args, maker = self.pop(), self.pop()
        if type(maker) is not Global or type(args) is not tuple:
            raise Refused("it calls what is not a function of tensors")
        self.push(maker.call(*args))

    def append(self, values: list) -> None:
        target = self.top()
        if type(target) is not list:
            raise Refused("it appends to what is not a list")
        target.extend(values)

    def set_items(self, values: list) -> None:
        target = self.top()
        if type(target) not in (dict, OrderedDict) or len(values) % 2:
            raise Refused("it sets items of what is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):  # tuples are refused: hashing a deeply nested one takes long
                raise Refused("it holds a dict whose keys are neither texts nor integers")
            target[key] = value

    def state(self) -> None:
        """Attributes of an OrderedDict: a state dict has the versions of its modules there. They are not used."""
        state, target = self.pop(), self.top()
        if type(target) is not OrderedDict or type(state) not in (dict, OrderedDict):
            raise Refused("it sets attributes (opcode BUILD) of what is not an OrderedDict")


ACTIONS: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": Machine.mark,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),  # LONG1
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.text("<I")),
    b"\x8c": lambda m: m.push(m.text("<B")),  # SHORT_BINUNICODE
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push(m.several(1)),
    b"\x86": lambda m: m.push(m.several(2)),
    b"\x87": lambda m: m.push(m.several(3)),
    b"t": lambda m: m.push(tuple(m.to_mark())),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.to_mark()),
    b"s": lambda m: m.set_items(list(m.several(2))),
    b"u": lambda m: m.set_items(m.to_mark()),
    b"q": lambda m: m.keep(m.number("<B")),
    b"r": lambda m: m.keep(m.number("<I")),
    b"\x94": lambda m: m.keep(len(m.memo)),  # MEMOIZE
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    b"c": lambda m: m.allowed(m.line(), m.line()),
    b"\x93": lambda m: m.allowed(*m.several(2)),  # STACK_GLOBAL
    b"Q": lambda m: m.push(m.fetch(m.pop())),
    b"R": Machine.make,
    b"b": Machine.state,
}
