"""Where a run reads and writes: what `data.own` stands for, and whether paths in object stores can be reached."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gp_jax.data.settings import DataSource
from gp_jax.errors import GlimpseError
from gp_jax.runtime.disk import folder_of, kind_of
from gp_jax.runtime.lock import only_one
from gp_jax.training.base_settings import BaseConfig
from gp_jax.training.checkpoint import run_folder
from gp_jax.training.settings import TrainConfig


def find_places(config: TrainConfig | BaseConfig) -> TrainConfig | BaseConfig:
    """The configuration with the held-out rows of `data.own` to validate on. Raises: GlimpseError that names a path out of reach.

    Not part of `check`, which must answer without a network.
    """
    for name, text in texts(config):
        if text.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
            raise GlimpseError(f'{name}={text}: paths in gs:// need gcsfs, pip install "gp_jax[gcs]"')
    if isinstance(config, BaseConfig) or config.data.own is None or config.data.validation:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, validation=tuple(held_out(config.data.own))))


def texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Fields that hold a text, by their whole names."""
    if isinstance(value, str):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from texts(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from texts(item, f"{name}[{number}]")


def held_out(folder: str) -> Iterator[DataSource]:
    """The rows that a prepared folder keeps apart as `val`, to validate on; none when there are none."""
    if kind_of(folder_of(folder) / "index-val.jsonl") is not None:
        yield DataSource(folder, split="val", sampling="first:200")


@contextlib.contextmanager
def alone(out: str) -> Iterator[None]:
    """One run at a time writes to a folder. The processes of a run are one: the first holds the lock, and all hear when it is refused.

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
