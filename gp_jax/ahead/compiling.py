"""Compiles the programs of a request without running them: `Compiler` replaces `shared_programs.Parts`, `CompilingEngine` the engine, and
the engine's own code decides which programs there are. Values are abstract arrays with a sharding, whose lifetimes are tracked."""

import contextlib
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from gp_jax.ahead.hlo import Facts, read
from gp_jax.buckets import Ladders
from gp_jax.errors import GlimpseError
from gp_jax.inference.engine import Engine
from gp_jax.inference.shared_programs import Kind, Parts, Programs, signature
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.target import targeting
from gp_jax.processing.layout import Sample
from gp_jax.sharding import batch_sharding, parameter_sharding, replicated
from gp_jax.trees import DecodeState, VisionFeatures

GIB = 2**30
VISION, PREFILL, FIRST, DECODE = STAGES = ("vision", "decoder prefill", "first token", "decode token")
T = TypeVar("T")


@dataclass
class Program:
    """A compiled program. Bytes and FLOPs are one chip's and one run's."""

    name: str  # its own: no other program of the same compiler has it
    stage: str  # of generation, see `CompilingEngine`
    seconds: float  # to trace and compile, beside what other threads compile
    arguments: int
    temporary: int
    outputs: int  # less what takes an argument's place
    code: int
    resident: int  # all that is on the chip while it runs: weights, what is kept for later programs, and the above
    flops: float  # by XLA: without kernels, loop bodies once
    bytes: float  # likewise
    facts: Facts

    @property
    def attention(self) -> str:
        """The attention kernel and its number of calls."""
        return f"splash x{self.facts.splash}" if self.facts.splash else "-"


class OnChip:
    """What programs need of a chip's memory. Subclasses say which programs, and how many bytes a chip has."""

    programs: tuple[Program, ...]
    hbm: int

    @property
    def fullest(self) -> Program:
        """The program while which most is on a chip."""
        return max(self.programs, key=lambda program: program.resident)

    @property
    def needed(self) -> int:
        """The most that is on a chip at any time."""
        return self.fullest.resident

    @property
    def fits(self) -> bool:
        return self.needed <= self.hbm

    def verdict(self, parts: str) -> str:
        """A line that says whether it fits. parts: of what is needed."""
        needs = f"needs {self.needed / GIB:.2f} GiB of {self.hbm / GIB:.2f} GiB per chip"
        return f"{needs}, {parts}: {'fits' if self.fits else 'DOES NOT FIT'} (most while '{self.fullest.name}' runs)"


class Memory:
    """Bytes held on a chip."""

    def __init__(self) -> None:
        self.held = 0

    def take(self, size: int) -> None:
        self.held += size


class Value(jax.ShapeDtypeStruct):
    """Abstract array with a tracked lifetime: its memory counts for as long as Python holds it. The estimate is an upper bound, because
    arrays that a program may overwrite count as well."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding, memory: Memory):
        super().__init__(shape, dtype, sharding=sharding)
        size = shard_bytes(self)
        memory.take(size)
        weakref.finalize(self, memory.take, -size)


def plain(tree: T) -> T:
    """The same with values as JAX accepts them."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) if isinstance(v, Value) else v, tree)


def shard_bytes(value: Any) -> int:
    """Bytes of a value on one chip."""
    shape = value.sharding.shard_shape(value.shape)
    return int(np.prod(shape)) * getattr(value.dtype, "itemsize", 8)


def bytes_of(tree: Any) -> int:
    """Bytes on one chip of all values in a tree."""
    return sum(map(shard_bytes, jax.tree.leaves(tree)))


def placed(model: LVLM, mesh: jax.sharding.Mesh) -> LVLM:
    """A model of shapes with their places on the mesh."""
    (graph, state), text = nnx.split(model), model.config.text

    def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        sharding = parameter_sharding(".".join(map(str, path)), variable.shape, mesh, text)
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding))

    return nnx.merge(graph, nnx.from_flat_state([(path, place(path, variable)) for path, variable in nnx.to_flat_state(state)]))


def quiet(name: str) -> contextlib.AbstractContextManager:
    """Prints nothing during a compilation."""
    return contextlib.nullcontext()


class Compiler(Parts):
    """Compiles each program once instead of running it, and returns abstract outputs. Threads, one per request, share the programs."""

    def __init__(self, mesh: jax.sharding.Mesh, weights: int, label: Callable, watch: Callable, rows: Mapping[int, int]):
        """weights: bytes on a chip; label: (function, args, static) -> name; watch: name -> context around its compilation; rows: of
        `hlo.read`."""
        super().__init__(mesh, Programs())
        self.weights, self.label, self.watch, self.rows = weights, label, watch, rows
        self.compiled: dict[tuple, Future] = {}  # of (Program, outputs)
        self.names: dict[tuple, str] = {}
        self.used: Counter[str] = Counter()
        self.lock, self.own = threading.RLock(), threading.local()

    def begin(self) -> None:
        """Begins a new request in this thread."""
        self.own.memory, self.own.ran, self.own.current, self.own.stage = Memory(), [], "", PREFILL

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Programs called inside belong to this stage of generation."""
        before, self.own.stage = self.own.stage, name
        try:
            yield
        finally:
            self.own.stage = before

    @property
    def memory(self) -> "Memory":
        return self.own.memory

    @property
    def held(self) -> int:
        """Bytes on a chip between programs: weights, values and the code of what has run."""
        return self.weights + self.memory.held + sum(p.code for p in {id(p): p for p in self.own.ran}.values())

    def take(self, part: Any) -> tuple[Kind, tuple]:
        with self.lock:
            return super().take(part)

    def program(self, function: Callable, static: tuple[str, ...], donate: tuple[int, ...]) -> Callable:
        with self.lock:
            return super().program(function, static, donate)

    def execute(self, program: Callable, function: Callable, kind: Kind | None, leaves: tuple, args: tuple, static: dict) -> Any:
        """Compiles the program if it is new, and records that it runs."""
        key = signature(program, kind, leaves, args, static)
        with self.lock:
            new = key not in self.compiled
            future = self.compiled.setdefault(key, Future())
            if new:
                name = self.label(function, args, static)
                self.used[name] += 1  # programs of one label are told apart: their types or weights differ
                self.names[key] = f"{name} ({self.used[name]})" if self.used[name] > 1 else name
        self.own.current = self.names[key]
        if new:
            try:
                future.set_result(self.compile(self.names[key], program, function, kind, leaves, args, static))
            except BaseException as error:
                future.set_exception(error)
        record, outputs = future.result()
        self.own.ran.append(record)
        record.resident = max(record.resident, self.held + record.temporary + record.outputs)
        return jax.tree.map(lambda out: Value(out.shape, out.dtype, out.sharding, self.memory), outputs)

    def programs_compiled(self) -> tuple[Program, ...]:
        """All compiled programs, in the order in which their compilation began."""
        return tuple(future.result()[0] for future in self.compiled.values())

    def compile(self, name: str, program: Any, function: Callable, kind: Kind | None, leaves: tuple, args: tuple, static: dict) -> tuple:
        """Returns: the record and the outputs as shapes with shardings."""
        args = plain(args)
        start = time.perf_counter()
        with self.watch(name), targeting("tpu"):
            lowered = program.lower(leaves, *args, kind=kind, **static)
            compiled = lowered.compile()
        seconds = time.perf_counter() - start
        memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
        record = Program(
            name=name,
            stage=self.own.stage,
            seconds=seconds,
            arguments=memory.argument_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            outputs=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
            code=memory.generated_code_size_in_bytes,
            resident=0,
            flops=costs.get("flops", 0.0),
            bytes=costs.get("bytes accessed", 0.0),
            facts=read(compiled.as_text(), self.rows),
        )

        def placed(out: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding)

        return record, jax.tree.map(placed, lowered.out_info, compiled.output_shardings)


class CompilingEngine(Engine):
    """The engine on abstract arrays. slots: vision slots of the samples' pictures; kept: rows that each cut leaves.

    It also says which stage a program belongs to, since it knows what it calls it for, whatever the model's parts are called.
    """

    call: Compiler

    def __init__(self, model: LVLM, ladders: Ladders, mesh: jax.sharding.Mesh, compiler: Compiler, slots: int, kept: Sequence[int]):
        super().__init__(model, ladders, mesh, parts=compiler)
        self.slots, self.kept = slots, list(kept)

    def see(self, *args: Any, **options: Any) -> VisionFeatures:
        with self.call.stage(VISION):
            return super().see(*args, **options)

    def start(self, *args: Any, **options: Any) -> DecodeState:
        with self.call.stage(FIRST):
            return super().start(*args, **options)

    def advance(self, *args: Any, **options: Any) -> DecodeState:
        with self.call.stage(DECODE):
            return super().advance(*args, **options)

    def split(self, tree: T, samples: int, axis: int = 0) -> T:
        split, whole = batch_sharding(self.mesh, samples, axis), replicated(self.mesh)
        return jax.tree.map(lambda x: Value(np.shape(x), x.dtype, split if np.ndim(x) > axis else whole, self.call.memory), tree)

    def place(self, tree: T) -> T:
        return jax.tree.map(lambda x: Value(np.shape(x), x.dtype, replicated(self.mesh), self.call.memory), tree)

    def vision_slots(self, samples: Sequence[Sample]) -> int:
        return self.slots

    def read(self, need: jax.Array) -> int:
        return self.kept.pop(0)


def shortage(error: Exception) -> GlimpseError | None:
    """The compiler's message that a program does not fit, in one line; None for any other error.

    Only where it speaks of HBM the numbers are a chip's: other memories (vmem) are too small for one kernel, and its own words say so.
    """
    reason = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in reason:
        return None
    number = r"([\d.]+)([KMGT])"
    forms = (f"Used {number} of {number} hbm", rf"\({number}\) exceeds available HBM \({number}\)")
    found = next((match for form in forms if (match := re.search(form, reason))), None)
    if not found:
        return GlimpseError(f"does not fit: {reason[:300]}")
    scale = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 1024.0}
    needed, limit = (float(found[i]) * scale[found[i + 1]] for i in (1, 3))
    return GlimpseError(f"needs {needed:.2f} GiB of {limit:.2f} GiB per chip")
