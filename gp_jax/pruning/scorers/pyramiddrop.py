"""PyramidDrop (arXiv 2410.17247): the deeper, the fewer.

Cuts in front of layers L/4, L/2 and 3L/4 (8, 16 and 24 of 32), each keeps the share lambda of the visual tokens that are left: those that
the last instruction token attends to most in the next layer (its projections applied to the current hidden states, as in the released
`pdrop_rank_drop`). Caches of layers before a cut are not cut.

Choices. lambda = r^(1/3), so that the last quarter of the layers sees the share r: `fixed_remain_ratio` is what is left at the end, as for
any other method. Averaged over layers the share is (1 + lambda + lambda^2 + lambda^3) / 4, also in decoding; it cannot be below a quarter,
so no lambda gives a small r on average. The released code renumbers positions after every cut; under M-RoPE that would break the grid of
rows and columns, so tokens keep their positions here. The last instruction token is the last prompt row.
"""

from gp_jax.pruning.scorers.attention import next_layer as score


def layers(depth: int) -> tuple[int, ...]:
    """The layers in front of the cuts."""
    return tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3))


def shares(ratio: float) -> tuple[float, ...]:
    """Of all visual tokens, what stays behind every cut."""
    return ratio ** (1 / 3), ratio ** (2 / 3), ratio


__all__ = ["layers", "score", "shares"]
