"""Paths of a run: resolves `data.own`, and checks that paths in object stores can be reached."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gp_jax.data.settings import DataSource
from gp_jax.errors import GlimpseError
from gp_jax.runtime.disk import folder_of, kind_of
from gp_jax.runtime.lock import only_one
from gp_jax.training.base_settings import BaseConfig
from gp_jax.training.checkpoint import run_folder
from gp_jax.training.plus.settings import PlusConfig
from gp_jax.training.settings import TrainConfig

T = TypeVar("T", bound="TrainConfig | BaseConfig | PlusConfig")


def find_places(config: T) -> T:
    """The configuration with the split `val` of `data.own` as validation data. Raises: GlimpseError that names an unreachable path.

    Not part of `check`, which must work without a network.
    """
    for name, text in texts(config):
        if text.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
            raise GlimpseError(f'{name}={text}: paths in gs:// need gcsfs, pip install "gp_jax[gcs]"')
    if isinstance(config, BaseConfig) or config.data.own is None or config.data.validation:
        return config
    assert dataclasses.is_dataclass(config), "a configuration"
    return dataclasses.replace(config, data=dataclasses.replace(config.data, validation=tuple(held_out(config.data.sources[0]))))


def texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All fields that hold a text: (full name, value)."""
    if isinstance(value, str):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from texts(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from texts(item, f"{name}[{number}]")


def held_out(own: DataSource) -> Iterator[DataSource]:
    """The split `val` of a prepared folder, asked and rewarded as its other records are; nothing when there is no such split."""
    if kind_of(folder_of(own.path) / "index-val.jsonl") is not None:
        yield dataclasses.replace(own, split="val", sampling="first:200")


@contextlib.contextmanager
def alone(out: str) -> Iterator[None]:
    """Makes sure that one run at a time writes to a folder. The first process of a run holds the lock; all its processes raise when the
    lock is refused.

    Raises: GlimpseError.
    """
    refused = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(only_one(run_folder(out), "train.py"))
            except GlimpseError as error:
                refused = error
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(refused is not None)):
            refused = refused or GlimpseError(f"{out}: the first process may not write there")
        if refused is not None:
            raise refused
        yield
