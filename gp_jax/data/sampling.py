"""Chooses the records of a pass over the data: sampling strategies and weighted mixtures, determined by seed and epoch."""

from collections.abc import Sequence

import numpy as np

from gp_jax.data.settings import DataSource, parse_sampling


def sample(count: int, sampling: str, seed: int) -> np.ndarray:
    """Numbers of the records that a strategy (all, random:N, first:N or end:N) takes of `count`. Returns: ascending (n,) int."""
    kind, wanted = parse_sampling(sampling)
    wanted = count if kind == "all" else min(wanted, count)
    if kind == "random":
        return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])
    return np.arange(count - wanted, count) if kind == "end" else np.arange(wanted)


def mixture(members: Sequence[np.ndarray], sources: Sequence[DataSource], seed: int, epoch: int) -> list[tuple[int, int]]:
    """One pass over the data: (source, record) pairs in random order.

    With weights a pass is as long as all members together; the records of each source are repeated, or left out at random, to match
    the source's share. Every epoch is drawn anew.
    """
    total = sum(m.size for m in members)
    weights = [s.weight for s in sources]
    all_weights = sum(weight for weight in weights if weight is not None)
    drawn = []
    for number, (own, weight) in enumerate(zip(members, weights, strict=True)):
        rng = np.random.default_rng((seed, epoch, number))
        wanted = own.size if weight is None else round(total * weight / all_weights)
        whole, rest = divmod(wanted, max(own.size, 1))
        chosen = np.concatenate([np.tile(own, whole), rng.permutation(own)[:rest]])
        drawn += [(number, int(record)) for record in chosen]
    order = np.random.default_rng((seed, epoch)).permutation(len(drawn))
    return [drawn[i] for i in order]
