"""Jitted programs over parts of a model. Parts of one kind (layers, blocks) share a program: their weights are its arguments.

So a prompt's length costs one decoder layer's compilation, not all of them, and a program's temporary memory is one layer's. The host
calls it once per layer, ahead of the device; that costs tens of microseconds a layer.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from gp_jax.runtime.clock import COMPILES


class Kind:
    """The structure that equal modules share. Kinds are compared by identity, so that a call does not compare graphs."""

    def __init__(self, graph: nnx.GraphDef, tree: Any):
        self.graph, self.tree = graph, tree

    def module(self, leaves: tuple) -> nnx.Module:
        """The module with these parameters."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


class Programs:
    """Jitted functions and the kinds that they are compiled for."""

    def __init__(self) -> None:
        self.kinds: dict[tuple, Kind] = {}
        self.jitted: dict[tuple, Callable] = {}


# Shared in this process: models of equal structure compile once. As with any function that is jitted at a module's
# level, `jax.clear_caches()` lets go of what was compiled.
SHARED = Programs()


def signature(program: Callable, kind: Kind | None, leaves: tuple, args: tuple, static: dict) -> tuple:
    """A key that is equal for calls of one compiled program: function, structure, and shapes, types and shardings of all arrays."""
    given, tree = jax.tree.flatten((leaves, args))
    shapes = tuple((v.shape, v.dtype, getattr(v, "weak_type", False), getattr(v, "sharding", None)) for v in given)
    return program, kind, tree, tuple(sorted(static.items())), shapes


class Known(NamedTuple):
    """A module that was seen before. Its parameters are read at every call, so changed weights are always seen."""

    own: weakref.ref  # an id is unique while the module lives
    kind: Kind
    variables: tuple[nnx.Variable, ...]
    attributes: tuple[tuple[dict, int], ...]  # of the module and the modules in it, with their number of entries
    children: tuple[tuple[dict, str, Any], ...]  # modules and variables, by owner and name

    def as_it_was(self) -> bool:
        """Whether it still consists of the same modules and variables. Takes microseconds for a layer."""
        same = all(inside.get(name) is child for inside, name, child in self.children)
        return same and all(len(inside) == count for inside, count in self.attributes)


class Parts:
    """Calls `function(*args, **static)` as a program: see `ops.layers.at_once`."""

    def __init__(self, mesh: Mesh | None = None, programs: Programs = SHARED):
        """programs: own ones where tracing depends on more than the arguments, for example on another platform than this machine's."""
        self.mesh, self.programs = mesh, programs
        self.known: dict[int, Known] = {}  # by id

    def __call__(self, function: Callable, *args: Any, donate: tuple[int, ...] = (), **static: Any) -> Any:
        """Args: args: a part of the model first, if the function takes one, whose parameters are then arguments of the program; donate:
        which of the others the program may overwrite."""
        with COMPILES.call(), jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            kind, leaves = None, ()
            if args and isinstance(args[0], nnx.Module):
                (kind, leaves), args = self.take(args[0]), args[1:]
            return self.execute(self.program(function, tuple(static), donate), function, kind, leaves, args, static)

    def execute(self, program: Callable, function: Callable, kind: Kind | None, leaves: tuple, args: tuple, static: dict) -> Any:
        """Runs a program. (`ahead.compiling` compiles it instead.)"""
        return program(leaves, *args, kind=kind, **static)

    def take(self, part: nnx.Module) -> tuple[Kind, tuple]:
        """A module as its kind and its parameters, as they are now."""
        known = self.known.get(id(part))
        if known is None or not known.as_it_was():
            known = self.known[id(part)] = self.look(part)
        return known.kind, tuple([variable.get_raw_value() for variable in known.variables])

    def look(self, part: nnx.Module) -> Known:
        """Inspects a module. The result is forgotten when the module is garbage-collected."""
        graph, state = nnx.split(part)
        tree = jax.tree.structure(state)
        kind = self.programs.kinds.setdefault((graph, tree), Kind(graph, tree))
        variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        inside = [vars(node) for _, node in nnx.iter_graph(part) if isinstance(node, nnx.Pytree)]
        children = [(own, name, child) for own in inside for name, child in own.items() if isinstance(child, nnx.Pytree | nnx.Variable)]
        key, known = id(part), self.known
        gone = weakref.ref(part, lambda _: known.pop(key, None))
        return Known(gone, kind, tuple(variables), tuple((own, len(own)) for own in inside), tuple(children))

    def program(self, function: Callable, static: tuple[str, ...], donate: tuple[int, ...]) -> Callable:
        """The jitted function; its own cache tells kinds, shapes and static settings apart."""
        key = function, static, donate
        if key not in self.programs.jitted:

            def call(leaves: tuple, *args: Any, kind: Kind | None, **static: Any) -> Any:
                return function(*args, **static) if kind is None else function(kind.module(leaves), *args, **static)

            call.__name__ = getattr(function, "__name__", "program")
            donated = tuple(n + 1 for n in donate)
            self.programs.jitted[key] = jax.jit(call, static_argnames=("kind", *static), donate_argnums=donated)
        return self.programs.jitted[key]
