"""Applies a row-wise function in slices, to bound the memory of intermediate values; on a CPU they also stay in the caches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.ops.target import targets


def in_slices(function: Callable, rows: tuple[Array, ...], least: int) -> Array:
    """Applies a function in at least `least` slices. Its arrays have a common leading axis and rows that do not depend on each other.

    Returns: as `function` of all at once.
    """
    count = rows[0].shape[0]
    least = min(least, count)
    if least < 2:
        return function(*rows)
    size = -(-count // next((n for n in range(least, 2 * least + 8) if count % n == 0), least))  # a remainder needs code of its own
    whole = count // size * size
    out = jax.lax.map(lambda part: function(*part), tuple(x[:whole].reshape(-1, size, *x.shape[1:]) for x in rows))
    out = out.reshape(whole, *out.shape[2:])
    return out if whole == count else jnp.concatenate([out, function(*(x[whole:] for x in rows))])


def on_one_cpu() -> bool:
    """Whether the program that is traced is for a CPU and without a mesh: over a mesh, slices would make the devices take turns."""
    return targets() == ("cpu",) and jax.sharding.get_abstract_mesh().empty
