"""The command `gp-jax`. Errors are one line on standard error and exit status 1."""

import difflib
import importlib
import os
import sys

from gp_jax import __version__
from gp_jax.errors import GlimpseError
from gp_jax.runtime.allocator import keep_memory
from gp_jax.runtime.exits import exit_status

# Modules of `gp_jax.commands`, each with parse(argv) and run(args), which returns an exit status or None for 0.
COMMANDS = {
    "ask": 'PHOTO [PHOTO ...] "question" --model DIR_OR_ID',
    "serve": "MODEL [--glimpse DIR_OR_ID] [--port 8000]",
    "prepare": "SOURCE [SOURCE ...] --images DIR --out DIR",
    "label": "ROWS.jsonl --images DIR --model DIR --out DIR",
    "train": "--config NAME_OR_FILE",
    "eval": "--config NAME_OR_FILE",
    "compile": "--model 7b --topology v5e:2x4",
    "export": "MODEL --to DIR --platforms cpu,tpu,cuda",
    "merge": "MODEL --adapter DIR_OR_ID --to DIR",
    "push": "RUN --to OWNER/NAME",
    "configs": "[NAME]",
    "doctor": "",
    "completion": "bash | zsh | fish",
}
LIGHT = ("configs", "completion")  # they do not use JAX
SUMMARIES = {
    "ask": "answer a question about photographs",
    "serve": "answer many users over HTTP, as OpenAI's interface does",
    "prepare": "check annotations and pictures, write them for training",
    "label": "write where a glimpse looks, as evidence for rows without boxes",
    "train": "train a glimpse, or fine-tune under pruning",
    "eval": "compare ways to prune: tables and a report",
    "compile": "compile for a TPU that is not here",
    "export": "write a model as one program that runs without gp_jax",
    "merge": "add a LoRA adapter to a model's weights",
    "push": "publish what a run has exported, with a model card",
    "configs": "list the configurations that --config knows by name",
    "doctor": "what this machine has, what is missing and how to install it",
    "completion": "print what completes commands in a shell",
}


def usage() -> str:
    """The text of `gp-jax --help`."""
    calls = {name: f"{name} {words}".strip() for name, words in COMMANDS.items()}
    width = max(map(len, calls.values())) + 2
    lines = [f"  {call.ljust(width)}{SUMMARIES[name]}" for name, call in calls.items()]
    more = "gp-jax COMMAND --help (or gp-jax help COMMAND) shows a command's options; gp-jax --version the version."
    return "\n".join(["usage: gp-jax COMMAND ...", "", "commands:", *lines, "", more])


def run(argv: list[str]) -> int:
    """Dispatches a command. Returns: the exit status; what fails raises."""
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
    elif argv[0] in ("-V", "--version"):
        print(f"gp-jax {__version__}")
    elif argv[0] in COMMANDS:
        command = importlib.import_module(f"gp_jax.commands.{argv[0]}")
        return command.run(command.parse(argv[1:])) or 0
    else:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        raise GlimpseError(
            f"unknown command '{argv[0]}'" + (f", did you mean '{near[0]}'?" if near else f" (commands: {', '.join(COMMANDS)})")
        )
    return 0


def main(argv: list[str] | None = None, name: str = "gp-jax") -> None:
    """Entry point. argv: the command line, by default the process's own; name: how errors call the command."""
    words = sys.argv[1:] if argv is None else argv
    if os.environ.get("NO_COLOR"):
        import tyro  # until `exit_status` runs, Ctrl-C is a traceback: little is imported before

        tyro._experimental_options["ansi_codes"] = False
    if words and words[0] in COMMANDS and words[0] not in LIGHT:
        keep_memory()
    if status := exit_status(name, lambda: run(words)):
        sys.exit(status)
