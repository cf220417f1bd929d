"""The command `gp-jax`. Errors are one line on standard error and exit status 1."""

import difflib
import importlib
import sys

from gp_jax import __version__
from gp_jax.config.files import exit_status
from gp_jax.errors import GlimpseError
from gp_jax.runtime.allocator import keep_memory

COMMANDS = ("ask", "serve", "prepare", "compile", "export", "merge")  # modules of `gp_jax.commands`, each with parse(argv) and run(args)
USAGE = """usage: gp-jax COMMAND ...

commands:
  ask PHOTO [PHOTO ...] "question" --model DIR_OR_ID    answer a question about photographs
  serve scenes                                          answer many users over HTTP, as OpenAI's interface does
  prepare SOURCE [SOURCE ...] --images DIR --out DIR    check annotations and pictures, write them for training
  compile --model 7b --topology v5e:2x4                 compile generation (or --what train, plus) for a TPU that is not here
  export MODEL --to DIR --platforms cpu,tpu,cuda        write a model as one program that runs without gp_jax
  merge MODEL --adapter DIR_OR_ID --to DIR              add a LoRA adapter to a model's weights

Training is `python train.py --help`. gp-jax COMMAND --help shows a command's options; gp-jax --version the version."""


def run(argv: list[str]) -> int:
    """Dispatches a command. Returns: the exit status; what fails raises."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "--version":
        print(f"gp-jax {__version__}")
    elif argv[0] in COMMANDS:
        command = importlib.import_module(f"gp_jax.commands.{argv[0]}")
        command.run(command.parse(argv[1:]))
    else:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        raise GlimpseError(
            f"unknown command '{argv[0]}'" + (f", did you mean '{near[0]}'?" if near else f" (commands: {', '.join(COMMANDS)})")
        )
    return 0


def main() -> None:
    """Entry point."""
    keep_memory()
    if status := exit_status("gp-jax", lambda: run(sys.argv[1:])):
        sys.exit(status)
