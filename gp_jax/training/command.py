"""The command line of `train.py`: a configuration file and typed options that override it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from gp_jax.config.files import exit_status, given_path, read_config
from gp_jax.training.base_settings import BaseConfig
from gp_jax.training.early import early_stops
from gp_jax.training.plus.settings import PlusConfig
from gp_jax.training.settings import TrainConfig

Config = TrainConfig | BaseConfig | PlusConfig


@dataclass(frozen=True)
class TrainLaunch:
    """The options that the command line adds to a configuration."""

    config: Path | None = None
    """A Python file whose `train` is a TrainConfig, a BaseConfig or a PlusConfig, e.g. configs/debug.py; the options below override it."""
    print_config: bool = False
    """Print the configuration as JSON and stop."""

    def train(self) -> Config:
        """The configuration without these options."""
        kind = next(kind for kind in KINDS if isinstance(self, kind))
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})


@dataclass(frozen=True)
class GlimpseLaunch(TrainLaunch, TrainConfig):
    """Train the glimpse of a frozen vision-language model. If --out holds a run already, it continues where it stopped."""


@dataclass(frozen=True)
class BaseLaunch(TrainLaunch, BaseConfig):
    """Train a whole small vision-language model on generated scenes. If --out holds a run already, it continues where it stopped."""


@dataclass(frozen=True)
class PlusLaunch(TrainLaunch, PlusConfig):
    """Fine-tune a vision-language model under pruning, by reinforcement or on answers. If --out holds a run already, it continues where it
    stopped."""


KINDS: dict[type, type[TrainLaunch]] = {TrainConfig: GlimpseLaunch, BaseConfig: BaseLaunch, PlusConfig: PlusLaunch}


def parse(argv: list[str]) -> TrainLaunch:
    """Reads the command line; the configuration file sets the defaults."""
    path = given_path(argv)
    base = TrainConfig() if path is None else read_config(path, "train", tuple(KINDS))
    kind = KINDS[type(base)]
    default = kind(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    return tyro.cli(kind, default=default, args=argv, prog="train.py", config=(tyro.conf.HelptextFromCommentsOff,))


def main(argv: list[str]) -> int:
    """Runs `train.py`. Returns: the exit status."""

    def body() -> int:
        launch = parse(argv)
        if launch.print_config:
            print(json.dumps(dataclasses.asdict(launch.train().check()), indent=2))
            return 0
        from gp_jax.training.loop import train  # takes seconds to import

        return 130 if train(launch.train())["signal"] == 2 else 0

    with early_stops():
        return exit_status("train.py", body)
