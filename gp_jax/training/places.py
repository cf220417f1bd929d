"""Where a run reads and writes: what `data.own` stands for, and whether paths in object stores can be reached."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

from etils import epath

from gp_jax.base_settings import BaseConfig
from gp_jax.errors import GlimpseError
from gp_jax.settings import DataSource, TrainConfig


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
    if (epath.Path(folder) / "index-val.jsonl").exists():
        yield DataSource(folder, split="val", sampling="first:200")
