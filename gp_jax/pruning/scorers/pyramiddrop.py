"""PyramidDrop (arXiv 2410.17247): the deeper, the fewer.

Cuts in front of layers L/4, L/2 and 3L/4 (8, 16 and 24 of 32), each keeps the share lambda of what the one before it left: the visual
tokens that the last instruction token attends to most, in the layer that comes next (its projections on the hidden states so far, as in
the released `pdrop_rank_drop`). Caches of layers in front of a cut stay whole.

Choices. lambda = r^(1/3), so that the share r is what the last quarter of the layers sees: `fixed_remain_ratio` means the end of the
pyramid, as for any other method. The average layer sees (1 + lambda + lambda^2 + lambda^3) / 4, which is what decoding reads too; it
cannot be less than a quarter, so no lambda would match a small r on average. The released code counts positions anew behind every
cut; under M-RoPE that would tear rows from columns, and here tokens keep theirs. The last instruction token is the last prompt row.
"""

from gp_jax.pruning.scorers.attention import next_layer as score


def layers(depth: int) -> tuple[int, ...]:
    """The layers in front of the cuts."""
    return tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3))


def shares(ratio: float) -> tuple[float, ...]:
    """Of all visual tokens, what stays behind every cut."""
    return ratio ** (1 / 3), ratio ** (2 / 3), ratio


__all__ = ["layers", "score", "shares"]
