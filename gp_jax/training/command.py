"""The command line of `train.py`: a configuration file, typed overrides, one line per error."""

import dataclasses
import difflib
import json
import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from gp_jax.base_settings import BaseConfig
from gp_jax.errors import GlimpseError
from gp_jax.settings import TrainConfig

Config = TrainConfig | BaseConfig


@dataclass(frozen=True)
class Launch:
    """What the command line adds to a configuration."""

    config: Path | None = None
    """A Python file whose `train` is a TrainConfig or a BaseConfig, e.g. configs/debug.py; the options below change it."""
    print_config: bool = False
    """Print the configuration as JSON and stop."""

    def train(self) -> Config:
        """The configuration alone."""
        kind = TrainConfig if isinstance(self, TrainConfig) else BaseConfig
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})


@dataclass(frozen=True)
class GlimpseLaunch(Launch, TrainConfig):
    """Train the glimpse of a frozen vision-language model. A run that is in --out already goes on where it stopped."""


@dataclass(frozen=True)
class BaseLaunch(Launch, BaseConfig):
    """Train a whole small vision-language model on generated scenes. A run that is in --out already goes on where it stopped."""


def read_config(path: Path) -> Config:
    """A configuration file. Raises: GlimpseError that says what is wrong with it."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [], n=1)
        raise GlimpseError(f"--config {path}: no such file" + (f", did you mean '{path.with_name(near[0])}'?" if near else ""))
    try:
        found = runpy.run_path(str(path)).get("train")
    except Exception as error:  # whatever a configuration file does wrong
        raise GlimpseError(f"--config {path}: {type(error).__name__}: {error}{suggestion(error)}") from error
    if not isinstance(found, Config):
        raise GlimpseError(f"--config {path}: needs `train = TrainConfig(...)` or `train = BaseConfig(...)`")
    return found


def suggestion(error: Exception) -> str:
    """A nearby field for a misspelt one."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kind = next((k for k in _classes() if match and k.__name__ == match[1]), None)
    near = difflib.get_close_matches(match[2], [f.name for f in dataclasses.fields(kind)], n=1) if kind else []
    return f"; did you mean '{near[0]}'?" if near else ""


def _classes() -> list[type]:
    """The dataclasses that a configuration is made of."""
    from gp_jax import base_settings, settings

    values = [*vars(settings).values(), *vars(base_settings).values()]
    return [value for value in values if dataclasses.is_dataclass(value) and isinstance(value, type)]


def parse(argv: list[str]) -> Launch:
    """Reads the command line; the configuration file sets the defaults."""
    path = None
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == "--config":
            path = value or (argv[i + 1] if i + 1 < len(argv) else "")
    base = read_config(Path(path)) if path is not None else TrainConfig()
    kind = GlimpseLaunch if isinstance(base, TrainConfig) else BaseLaunch
    default = kind(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    return tyro.cli(kind, default=default, args=argv, prog="train.py", config=(tyro.conf.HelptextFromCommentsOff,))


def main(argv: list[str]) -> int:
    """Runs `train.py`. Returns: the exit status."""
    try:
        launch = parse(argv)
        if launch.print_config:
            print(json.dumps(dataclasses.asdict(launch.train().check()), indent=2))
            return 0
        from gp_jax.training.loop import train

        stopped = train(launch.train())["signal"]
        return 130 if stopped == 2 else 0
    except GlimpseError as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("GP_JAX_TRACEBACK"):
            raise
        reason = " ".join(str(error).split())[:300]
        print(f"train.py: unexpected {type(error).__name__}: {reason} (GP_JAX_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
