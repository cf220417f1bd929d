"""Rotary position embeddings: 1-D, M-RoPE and the 2-D kind of vision towers.

All angles, cosines and sines are float32 and rotation happens in float32: in bfloat16 position 257 would round to 256.
Heads come in the (..., heads, T, H) layout of `attention.attend`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gp_jax.ops.target import targets


def inverse_frequencies(width: int, theta: float) -> np.ndarray:
    """theta^(-2j/width) for j < width/2. Returns: (width / 2,) float32."""
    return (1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)


def text_angles(positions: Array, head_dim: int, theta: float, sections: tuple[int, ...] = (), interleaved: bool = False) -> Array:
    """Angles of a decoder's rope.

    Args:
        positions: (A, B, T) int, A = 1, or 3 with `sections`.
        sections: frequencies per axis (M-RoPE); empty for 1-D.
        interleaved: the axes take turns (Qwen3-VL); else they stand in order (Qwen2-VL, arXiv 2409.12191).
    Returns: (B, T, head_dim / 2) float32.
    """
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim, theta)  # (A, B, T, H/2)
    if not sections:
        return angles[0]
    if interleaved:
        axis = interleaved_axes(head_dim // 2, sections)
        return jnp.where(axis == 0, angles[0], jnp.where(axis == 1, angles[1], angles[2]))
    ends = np.cumsum(sections)
    return jnp.concatenate(
        [angles[axis, ..., end - size : end] for axis, (end, size) in enumerate(zip(ends, sections, strict=True))], axis=-1
    )


def interleaved_axes(frequencies: int, sections: tuple[int, ...]) -> np.ndarray:
    """The axis that turns every frequency: time, row, column, time, ... while rows and columns have frequencies left of their own, then
    time. Returns: (frequencies,) int."""
    axes = np.zeros(frequencies, int)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def grid_angles(hw: Array, head_dim: int, theta: float = 10000.0) -> Array:
    """Angles of a 2-D rope: the first half of the frequencies is for the row, the second for the column.

    Args: hw: (..., 2) int, row and column.
    Returns: (..., head_dim / 2) float32.
    """
    angles = hw.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim // 2, theta)  # (..., 2, H/4)
    return angles.reshape(*hw.shape[:-1], head_dim // 2)


def rotate(x: Array, angles: Array) -> Array:
    """Rotates pairs (i, i + H/2) of x by `angles`.

    Args: x: (B, heads, T, H); angles: (B, T, H / 2) float32.
    Returns: as x, same dtype.
    """
    cos, sin = (_computed_once(f(angles))[:, None] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _computed_once(x: Array) -> Array:
    """Returns x. On CPU XLA would fuse the cosines into every operation that uses them and recompute them for every head and layer, which
    costs more than the rest of the rope. An exact product with the identity prevents that fusion."""

    def identity(x: Array) -> Array:
        return jnp.einsum("...h,hk->...k", x, np.eye(x.shape[-1], dtype=np.float32), precision="highest")

    if "cpu" not in targets():
        return x
    return identity(x) if targets() == ("cpu",) else jax.lax.platform_dependent(x, cpu=identity, default=lambda x: x)
