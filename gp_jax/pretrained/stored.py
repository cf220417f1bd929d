"""Tensors as immutable views of a file, checked when they are made and when they are read."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gp_jax.errors import printable
from gp_jax.pretrained.pickles import Refused

MOST_AXES = 32
MOST_VALUES = 2**48  # of a tensor, axes of length 0 not counted


@dataclass(frozen=True, slots=True)
class StorageType:
    dtype: np.dtype


@dataclass(frozen=True, slots=True)
class Storage:
    """`count` values in a file. A tensor is a view of one storage."""

    path: Path
    start: int  # byte
    dtype: np.dtype
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A strided view of a storage, read on demand. Raises: Refused if it would reach outside its storage or repeat values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises: Refused unless its fields are valid."""
        if type(self.storage) is not Storage or type(self.shape) is not tuple or type(self.stride) is not tuple:
            raise Refused("a tensor is not a view of a storage")
        axes, strides, count = len(self.shape), len(self.stride), self.storage.count
        if axes != strides or axes > MOST_AXES:
            raise Refused(f"a tensor is impossible: {axes} sizes and {strides} strides (they must be equal in number, at most {MOST_AXES})")
        if not all(type(n) is int for n in (self.offset, *self.shape, *self.stride)):  # not shown: tuples of tuples may have any length
            raise Refused("a tensor is impossible: its sizes and strides are not all integers")
        if not all(0 <= n <= MOST_VALUES for n in (self.offset, *self.shape, *self.stride)):
            raise Refused(f"a tensor has impossible sizes {printable(self.shape, 100)} or strides {printable(self.stride, 100)}")
        values = math.prod(n or 1 for n in self.shape)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if values > MOST_VALUES if 0 in self.shape else values > count or last >= count:
            raise Refused(f"a tensor of shape {printable(self.shape, 100)} reaches beyond its storage of {count} values")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A rectangle; () for all of it."""
        self.check()
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)[index]
        values = np.memmap(self.storage.path, self.storage.dtype, "r", self.storage.start, (self.storage.count,))
        strides = tuple(s * values.itemsize for s in self.stride)
        return np.array(np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides)[index])
