"""The command `gp-jax configs`."""

import ast
import shutil
import textwrap
from dataclasses import dataclass
from typing import Annotated

import tyro

from gp_jax.config.files import find_config, home, shipped


@dataclass(frozen=True)
class Configs:
    """List the configurations that come with gp_jax. `--config NAME` finds them from any folder; copy one to make your own."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """Print this configuration's file instead."""


def run(args: Configs) -> None:
    """Runs `gp-jax configs`."""
    if args.name:
        from pathlib import Path

        print(find_config(Path(args.name)).read_text(encoding="utf-8"), end="")
        return
    found, columns = shipped(), shutil.get_terminal_size((140, 24)).columns
    width = max((len(path.stem) for path in found), default=0) + 2
    for path in found:
        first, _, rest = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")
        about = " ".join(rest.strip().split("\n\n")[0].split())
        print(path.stem.ljust(width) + first)
        for line in textwrap.wrap(about, max(40, columns - width)):
            print(" " * width + line)
    print(f"\nin {home()}; `gp-jax configs NAME` prints one")


def parse(argv: list[str]) -> Configs:
    """Reads the command line."""
    return tyro.cli(Configs, args=argv, prog="gp-jax configs", config=(tyro.conf.HelptextFromCommentsOff,))
