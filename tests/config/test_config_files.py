"""Configurations are found by name from any folder, and a file for another command is refused before it is executed."""

from pathlib import Path

import pytest

from gp_jax import GlimpseError
from gp_jax.config.files import find_config, home, read_config, shipped
from gp_jax.evaluation.settings import EvalConfig

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", ["eval_scenes", "eval_scenes.py", "configs/eval_scenes.py"])
def test_a_name_is_known_everywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_config(Path(name)) == home() / "eval_scenes.py"
    assert read_config(Path(name), "evaluation", (EvalConfig,)).limit == 600


def test_a_file_that_is_there_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("eval_scenes.py").write_text("from gp_jax.evaluation.settings import EvalConfig\nevaluation = EvalConfig(limit=7)")
    assert read_config(Path("eval_scenes.py"), "evaluation", (EvalConfig,)).limit == 7
    assert read_config(Path("eval_scenes"), "evaluation", (EvalConfig,)).limit == 600


@pytest.mark.parametrize(
    "name, said",
    [
        ("eval_scene", "did you mean 'eval_scenes'?"),
        ("nothing_like_it", "`gp-jax configs` lists"),
        ("other/eval_scenes.py", "no such file"),
    ],
)
def test_a_name_that_is_not_known(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GlimpseError, match=r"--config .*no such file, ") as error:
        find_config(Path(name))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("train = 1", "is a configuration of gp-jax train, not of gp-jax ask"),
        ("from configs.debug import train", "is a configuration of gp-jax train"),
        ("def ask(): pass", r"needs `ask = dict\(...\)`"),
        ("if True:\n    other = 1", r"needs `ask = dict\(...\)`"),
        ("x = (", "SyntaxError"),
    ],
)
def test_a_file_for_something_else_is_not_executed(tmp_path, text, said):
    path = tmp_path / "mine.py"
    path.write_text(f"{text}\nopen({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(GlimpseError, match=said):
        read_config(path, "ask", (dict,))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["if True:\n    ask = {}", "ask: dict = {}", "globals()['ask'] = {}", "for ask in [{}]: pass"])
def test_however_it_is_assigned(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    assert read_config(tmp_path / "mine.py", "ask", (dict,)) == {}


def test_every_configuration_says_how_it_is_run():
    for path in shipped():
        first = path.read_text().splitlines()[0]
        assert first.startswith('"""gp-jax ') and f"--config {path.stem}" in first, path
