"""Commands about the commands: help, configurations, completion, and one clear line for what was meant."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gp_jax import GlimpseError, cli
from gp_jax.commands import ask, completion, doctor
from gp_jax.config.files import shipped
from gp_jax.pretrained.files import find_folder

pytestmark = pytest.mark.quick


def test_help_names_every_command(capsys):
    for words in ([], ["--help"], ["help"]):
        assert cli.run(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text or f"\n  {name}" in text for name in cli.COMMANDS)
    assert set(cli.COMMANDS) == set(cli.SUMMARIES) == set(completion.OPTIONS)
    assert set(cli.COMMANDS) == {path.stem for path in Path(ask.__file__).parent.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("words", [["help", "merge"], ["merge", "--help"]])
def test_help_of_a_command(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.run(words)
    assert stop.value.code == 0 and "--adapter" in capsys.readouterr().out


def test_configurations_are_listed_with_their_first_lines(capsys):
    cli.run(["configs"])
    text = capsys.readouterr().out
    for path in shipped():
        assert f"{path.stem} " in text and path.read_text().splitlines()[0].strip('"') in text
    cli.run(["configs", "demo"])
    assert capsys.readouterr().out == next(path for path in shipped() if path.stem == "demo").read_text()


def complete(script: str, *words: str) -> set[str]:
    """What bash offers for the last word."""
    listed = " ".join(f"'{word}'" for word in words)
    code = f"{script}\nCOMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _gp_jax; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return set(subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_bash_completes_commands_options_configurations_and_values(tmp_path):
    script = completion.script("bash")
    assert complete(script, "gp-jax", "e") == {"eval", "export"}
    assert complete(script, "gp-jax", "ask", "--max-n") == {"--max-new-tokens"}
    assert {"--optim.learning-rate", "--optim.name"} <= complete(script, "gp-jax", "train", "--optim.")
    assert complete(script, "gp-jax", "eval", "--config", "eval_s") == {"eval_scenes"}
    assert complete(script, "gp-jax", "compile", "--plan", "") == {"glimpse", "dense", "look"}
    assert complete(script, "gp-jax", "completion", "") == {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells(shell):
    script = completion.script(shell)
    assert "qwen2_5_vl_7b_gqa" in script and "max-new-tokens" in script
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n", "-c", script] if shell == "zsh" else [shell, "-n"], input=script, text=True, check=False)
        assert checked.returncode == 0


def test_completed_options_are_those_of_the_command(capsys):
    for name in ("prepare", "merge", "compile"):
        with pytest.raises(SystemExit):
            cli.run([name, "--help"])
        shown = capsys.readouterr().out
        assert all(option in shown for option in completion.tables()[name] if not option.startswith("--no-"))


@pytest.mark.parametrize("threshold", ["2", "-0.5", "1", "nan"])
def test_a_threshold_that_nothing_can_pass(threshold):
    with pytest.raises(GlimpseError, match="--threshold .* is not in 0..1: visual tokens stay whose importance"):
        ask.parse(["p.png", "q", "--model", "m", "--threshold", threshold]).check()


def test_a_bundled_model_that_was_meant():
    with pytest.raises(GlimpseError, match="scene: no such folder; did you mean 'scenes', the bundled model?"):
        find_folder("scene", ())


def test_ask_refuses_a_configuration_of_training():
    with pytest.raises(GlimpseError, match="--config debug: is a configuration of gp-jax train, not of gp-jax ask"):
        ask.parse(["p.png", "q", "--config", "debug"])


def test_compile_says_first_how_to_install_the_compiler(monkeypatch):
    from gp_jax.commands import compile as command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GlimpseError, match="the TPU compiler is not installed: pip install libtpu"):
        command.run(command.Compile())


def test_doctor_says_what_is_here_and_what_does_not_work(capsys, monkeypatch):
    def broken() -> str:
        raise OSError("no folder")

    monkeypatch.setattr(doctor, "cache", broken)
    assert doctor.run(doctor.Doctor(offline=True)) == 1
    text = capsys.readouterr().out
    assert "does not work: OSError: no folder" in text and "not in order: compiled" in text
    assert all(name in text for name in ("jax", "cores", "free of", "backend cpu", "TPU", "NVIDIA", "scenes", "offline"))


def test_no_color_is_respected(tmp_path):
    code = "import pty, sys; pty.spawn([sys.executable, '-m', 'gp_jax', 'merge', '--help'])"
    environment = {"PATH": "/usr/bin:/bin", "NO_COLOR": "1", "TERM": "xterm", "GLIBC_TUNABLES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(cli.__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert "--adapter" in done.stdout and "\x1b[" not in done.stdout
