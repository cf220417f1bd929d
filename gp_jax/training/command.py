"""The command line of `gp-jax train` and `train.py`: a configuration file and typed options that override it."""

import dataclasses
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import tyro

from gp_jax.config.files import given_path, read_config
from gp_jax.runtime.exits import INTERRUPTED, exit_status
from gp_jax.runtime.progress import waiting
from gp_jax.training.base_settings import BaseConfig
from gp_jax.training.early import early_stops
from gp_jax.training.plus.settings import PlusConfig
from gp_jax.training.settings import TrainConfig

Config = TrainConfig | BaseConfig | PlusConfig


@dataclass(frozen=True)
class TrainLaunch:
    """The options that the command line adds to a configuration."""

    config: Path | None = None
    """Name of a configuration (gp-jax configs lists them), or a Python file whose `train` is a TrainConfig, a BaseConfig or a
    PlusConfig; the options below override it."""
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


def parse(argv: list[str], prog: str = "gp-jax train") -> TrainLaunch:
    """Reads the command line; the configuration file sets the defaults."""
    path = given_path(argv)
    with waiting(f"reading {path}"):  # a configuration may make its own inputs, as `debug` does
        base = TrainConfig() if path is None else read_config(path, "train", tuple(KINDS))
    kind = KINDS[type(base)]
    default = kind(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    return tyro.cli(kind, default=default, args=argv, prog=prog, config=(tyro.conf.HelptextFromCommentsOff,))


def run(launch: TrainLaunch) -> int:
    """Trains, or prints the configuration. Returns: the exit status."""
    if launch.print_config:
        print(json.dumps(dataclasses.asdict(launch.train().check()), indent=2))
        return 0
    with waiting("loading libraries"):
        from gp_jax.training.loop import train

    return INTERRUPTED if train(launch.train())["signal"] == signal.SIGINT else 0


def main(argv: list[str], command: str = "train.py") -> int:
    """Runs `train.py`. Returns: the exit status."""
    with early_stops():
        return exit_status(command, lambda: run(parse(argv, command)))
