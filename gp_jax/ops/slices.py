"""Work on many rows, some at a time: what lies between its products then takes little memory, and on a CPU stays in the caches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.ops.target import targets


def in_slices(function: Callable, rows: tuple[Array, ...], least: int) -> Array:
    """`function` of arrays with a common leading axis, whose outputs depend on their own rows only, in at least so many slices.

    Returns: as `function` of all at once.
    """
    count = rows[0].shape[0]
    least = min(least, count)
    if least < 2:
        return function(*rows)
    size = -(-count // next((n for n in range(least, 2 * least + 8) if count % n == 0), least))  # a remainder is compiled apart
    whole = count // size * size
    out = jax.lax.map(lambda part: function(*part), tuple(x[:whole].reshape(-1, size, *x.shape[1:]) for x in rows))
    out = out.reshape(whole, *out.shape[2:])
    return out if whole == count else jnp.concatenate([out, function(*(x[whole:] for x in rows))])


def on_one_cpu() -> bool:
    """Whether the program that is being traced is for a CPU and is not spread over a mesh, whose devices would have to take turns."""
    return targets() == ("cpu",) and jax.sharding.get_abstract_mesh().empty
