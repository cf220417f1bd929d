"""The command `gp-jax completion`: a script for the shell, made from the commands' own options."""

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from gp_jax.config.files import shipped

Shell = Literal["bash", "zsh", "fish"]
# Module and dataclass of each command's options.
OPTIONS = {
    "ask": ("gp_jax.commands.ask", "Ask"),
    "serve": ("gp_jax.serving.settings", "ServerSettings"),
    "prepare": ("gp_jax.commands.prepare", "Prepare"),
    "label": ("gp_jax.commands.label", "Label"),
    "train": ("gp_jax.training.command", "GlimpseLaunch"),
    "eval": ("gp_jax.evaluation.command", "EvalLaunch"),
    "compile": ("gp_jax.commands.compile", "Compile"),
    "export": ("gp_jax.commands.export", "Export"),
    "merge": ("gp_jax.commands.merge", "Merge"),
    "push": ("gp_jax.commands.push", "Push"),
    "configs": ("gp_jax.commands.configs", "Configs"),
    "doctor": ("gp_jax.commands.doctor", "Doctor"),
    "completion": ("gp_jax.commands.completion", "Completion"),
}


@dataclass(frozen=True)
class Completion:
    """Print a script that completes commands, options and names of configurations.

    bash: source <(gp-jax completion bash), e.g. in ~/.bashrc
    zsh: source <(gp-jax completion zsh) behind compinit, e.g. in ~/.zshrc
    fish: gp-jax completion fish > ~/.config/fish/completions/gp-jax.fish
    """

    shell: Annotated[Shell, tyro.conf.Positional]
    """The shell to print it for."""


def options(kind: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """The options of a dataclass, with the values that they can have; those of dataclasses inside it with their prefix."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], prefix + field.name.replace("_", "-")
        if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
            continue
        if dataclasses.is_dataclass(hint):
            yield from options(hint, f"{name}.")
            continue
        values = [value for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is Literal for value in typing.get_args(part)]
        yield f"--{name}", tuple(map(str, values))
        if hint is bool:
            yield f"--{prefix}no-{field.name.replace('_', '-')}", ()


def tables() -> dict[str, dict[str, tuple[str, ...]]]:
    """Every command's options with their values."""
    found = {}
    for command, (module, name) in OPTIONS.items():
        found[command] = {"--help": ()} | dict(options(getattr(importlib.import_module(module), name)))
    return found


def script(shell: Shell) -> str:
    """The text for a shell."""
    names, known = [path.stem for path in shipped()], tables()
    return {"bash": bash, "zsh": zsh, "fish": fish}[shell](names, known)


Tables = dict[str, dict[str, tuple[str, ...]]]


def values_of(known: Tables) -> Iterator[tuple[str, str, str]]:
    """(command, option, values) of options that can only have some."""
    for command, own in known.items():
        for option, values in own.items():
            if values:
                yield command, option, " ".join(values)


def bash(names: list[str], known: Tables) -> str:
    """For bash."""
    chosen = "\n".join(
        f'    "{command} {option}") COMPREPLY=($(compgen -W "{values}" -- "$word")); return ;;'
        for command, option, values in values_of(known)
    )
    listed = "\n".join(f'    {command}) options="{" ".join(own)}" ;;' for command, own in known.items())
    return f"""# gp-jax completion bash
_gp_jax() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} options=
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join([*known, "help", "--version"])}" -- "$word")); return
  fi
  case "$command $before" in
    *" --config") COMPREPLY=($(compgen -W "{" ".join(names)}" -- "$word") $(compgen -f -X '!*.py' -- "$word")); return ;;
    "help "*) COMPREPLY=($(compgen -W "{" ".join(known)}" -- "$word")); return ;;
    "completion "*) COMPREPLY=($(compgen -W "{" ".join(typing.get_args(Shell))}" -- "$word")); return ;;
    "configs "*) COMPREPLY=($(compgen -W "{" ".join(names)}" -- "$word")); return ;;
{chosen}
  esac
  case "$command" in
{listed}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _gp_jax gp-jax"""


def zsh(names: list[str], known: Tables) -> str:
    """For zsh."""
    chosen = "\n".join(f'    "{command} {option}") compadd -- {values}; return ;;' for command, option, values in values_of(known))
    listed = "\n".join(f"    {command}) options=({' '.join(own)}) ;;" for command, own in known.items())
    return f"""#compdef gp-jax
_gp_jax() {{
  local -a options
  if (( CURRENT == 2 )); then compadd -- {" ".join([*known, "help", "--version"])}; return; fi
  case "$words[2] $words[CURRENT-1]" in
    *" --config") compadd -- {" ".join(names)}; _files -g '*.py'; return ;;
    "help "*) compadd -- {" ".join(known)}; return ;;
    "completion "*) compadd -- {" ".join(typing.get_args(Shell))}; return ;;
    "configs "*) compadd -- {" ".join(names)}; return ;;
{chosen}
  esac
  case "$words[2]" in
{listed}
  esac
  if [[ "$words[CURRENT]" == -* ]]; then compadd -- $options; else _files; fi
}}
compdef _gp_jax gp-jax"""


def fish(names: list[str], known: Tables) -> str:
    """For fish."""
    lines = [f"complete -c gp-jax -n __fish_use_subcommand -f -a '{' '.join([*known, 'help'])}'"]
    lines.append("complete -c gp-jax -n __fish_use_subcommand -l version")
    for command, own in known.items():
        seen = f"complete -c gp-jax -n '__fish_seen_subcommand_from {command}'"
        for option, values in own.items():
            given = f" -x -a '{' '.join(values)}'" if values else f" -a '{' '.join(names)}' -r" if option == "--config" else ""
            lines.append(f"{seen} -l {option.removeprefix('--')}{given}")
    lines.append(f"complete -c gp-jax -n '__fish_seen_subcommand_from help' -f -a '{' '.join(known)}'")
    lines.append(f"complete -c gp-jax -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(typing.get_args(Shell))}'")
    lines.append(f"complete -c gp-jax -n '__fish_seen_subcommand_from configs' -f -a '{' '.join(names)}'")
    return "\n".join(["# gp-jax completion fish", *lines])


def run(args: Completion) -> None:
    """Runs `gp-jax completion`."""
    print(script(args.shell))


def parse(argv: list[str]) -> Completion:
    """Reads the command line."""
    return tyro.cli(Completion, args=argv, prog="gp-jax completion", config=(tyro.conf.HelptextFromCommentsOff,))
