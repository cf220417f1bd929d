"""An evaluation of a model with an adapter: answers are kept apart from those of the base and of other adapters."""

import json

import pytest
from adapter_tools import tensors, write
from evaluation_tools import answers, evaluate, made_up, make_home, row

from gp_jax import GlimpseVLM
from gp_jax.models.adapter import adapted

pytestmark = pytest.mark.quick


def test_the_adapter_is_part_of_what_answers_are_made_with(tmp_path, monkeypatch, capsys):
    home, seen = make_home(tmp_path / "home"), []

    def answer(self, *args, **options):
        seen.append(len(list(adapted(self.model))))
        return made_up(self, *args, **options)

    monkeypatch.setattr(GlimpseVLM, "answer", answer)
    vlm = GlimpseVLM.from_pretrained(home / "model")
    adapter = write(tmp_path / "adapter", tensors(vlm))
    assert evaluate(home, tmp_path, [row(0)], "--adapter", str(adapter)) == 0
    assert set(seen) == {14} and len(answers(tmp_path)) == 4
    made_with = json.loads((tmp_path / "out" / "made_with.json").read_text())
    assert made_with["adapter"] == str(adapter)
    assert {name for name in made_with["files"] if name.startswith("adapter/")} == {"adapter/weights", "adapter/adapter_config.json"}
    assert f"adapter: {adapter}" in (tmp_path / "out" / "report" / "index.html").read_text()

    seen.clear()
    assert evaluate(home, tmp_path, [row(0)], "--adapter", str(adapter)) == 0 and not seen
    capsys.readouterr()
    assert evaluate(home, tmp_path, [row(0)]) == 1
    assert "holds answers made with something else (adapter: " in capsys.readouterr().err
    write(adapter, tensors(vlm, seed=1))
    assert evaluate(home, tmp_path, [row(0)], "--adapter", str(adapter)) == 1
    assert "adapter/weights changed" in capsys.readouterr().err


def test_answers_of_before_there_were_adapters_still_count(tmp_path, monkeypatch):
    home = make_home(tmp_path / "home")
    monkeypatch.setattr(GlimpseVLM, "answer", made_up)
    assert evaluate(home, tmp_path, [row(0)]) == 0
    notes = tmp_path / "out" / "made_with.json"
    made_with = json.loads(notes.read_text())
    del made_with["adapter"]
    notes.write_text(json.dumps(made_with))
    assert evaluate(home, tmp_path, [row(0)]) == 0
