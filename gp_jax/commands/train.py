"""The command `gp-jax train`, which `train.py` is too. SIGTERM ends it with status 0 before the first step: see `training.early`."""

from gp_jax.training import command
from gp_jax.training.early import early_stops


def parse(argv: list[str]) -> command.TrainLaunch:
    """Reads the command line and the configuration."""
    with early_stops():
        return command.parse(argv)


def run(args: command.TrainLaunch) -> int:
    """Runs `gp-jax train`. Returns: the exit status."""
    with early_stops():
        return command.run(args)
