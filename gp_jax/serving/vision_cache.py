"""Pictures as the vision tower sees them, kept by their content: whoever sends the same picture again skips the tower.

The tower sees every picture on its own. A prompt with several pictures has its windows packed together, so their features are pasted into
the order of the prompt's vision slots. M vision slots of the prompt, S of a picture.
"""

from collections import OrderedDict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gp_jax.processing.layout import Sample
from gp_jax.trees import Array, VisionFeatures

Key = tuple[bytes, tuple[int, ...]]  # digest of the picture, vision blocks that were watched


class VisionCache:
    """Features of the pictures that were used last, up to `limit` bytes. Only one thread uses it."""

    def __init__(self, limit: int):
        self.limit, self.held, self.hits, self.misses = limit, 0, 0, 0
        self.kept: OrderedDict[Key, tuple[VisionFeatures, int]] = OrderedDict()

    def get(self, key: Key) -> VisionFeatures | None:
        """A picture's features, if they are here."""
        found = self.kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self.kept.move_to_end(key)
        return found[0]

    def put(self, key: Key, features: VisionFeatures) -> None:
        """Keeps a picture's features; those that were not used for longest give way."""
        size = sum(array.nbytes for array in jax.tree.leaves(features))
        if size > self.limit or key in self.kept:
            return
        self.kept[key] = features, size
        self.held += size
        while self.held > self.limit:
            self.held -= self.kept.popitem(last=False)[1][1]


def paste(page: VisionFeatures | None, picture: VisionFeatures, source: Array, *, slots: int) -> VisionFeatures:
    """Puts one picture's features (1, S, ...) on a prompt's (1, M, ...). page: None: empty. source: (M,) int, slot of the picture, -1:
    another picture's place. Arrays without slots (a line break) are those of any picture."""

    def onto(old: Array | None, new: Array) -> Array:
        if new.ndim < 2:
            return new
        here = (source >= 0).reshape(1, slots, *(1,) * (new.ndim - 2))
        return jnp.where(here, jnp.take(new, jnp.maximum(source, 0), axis=1), 0 if old is None else old)

    if page is None:
        return jax.tree.map(lambda new: onto(None, new), picture)
    return jax.tree.map(onto, page, picture)


def sources(sample: Sample, pictures: Sequence[Sample], slots: int) -> list[np.ndarray]:
    """Per picture of a prompt the `source` of `paste`, from the patch group that every slot of the prompt holds."""
    found, first = [], 0
    for picture in pictures:
        own = np.flatnonzero(picture.groups >= 0)
        slot_of_group = np.empty(own.size, np.int32)
        slot_of_group[picture.groups[own]] = own
        local = np.full(slots, -1)
        local[: sample.groups.size] = np.where(sample.groups >= 0, sample.groups - first, -1)
        here = (local >= 0) & (local < own.size)
        found.append(np.where(here, slot_of_group[np.where(here, local, 0)], -1).astype(np.int32))
        first += own.size
    return found
