"""What a folder answers with: every file that decides an answer, by name."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from gp_jax import GlimpseError
from gp_jax.pretrained.files import staged
from gp_jax.pretrained.identity import folder_identity
from gp_jax.pretrained.tower import copy_beside

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": np.zeros(4, np.float32)}, folder / "model.safetensors")
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "adapter_config.json"):
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "README.md").write_text("words")
    return folder


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_every_file_that_decides_is_named(folder):
    before = folder_identity(folder)
    assert folder_identity(folder) == before
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".jinja"))
    for name in [*names, "tokenizer.model", "merges.txt", "additional_chat_templates/other.jinja"]:
        was = folder_identity(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"x": 1}')
        assert changed(was, folder_identity(folder)) == {name}
    was = folder_identity(folder)
    save_file({"x": np.ones(4, np.float32)}, folder / "model.safetensors")
    assert changed(was, folder_identity(folder)) == {"weights"}


def test_what_nobody_reads_changes_nothing(folder):
    before = folder_identity(folder)
    for name in ("README.md", "LICENSE.txt", "trainer_state.json", "all_results.json"):
        (folder / name).write_text("other words")
    os.mkfifo(folder / "pipe.json")
    os.mkfifo(folder / "pipe.bin")
    (folder / "a_folder.json").mkdir()
    assert folder_identity(folder) == before


def test_a_tower_in_a_folder_of_its_own_counts(folder):
    tower = folder.parent / "clip"
    tower.mkdir()
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "somebody/clip"}))
    (tower / "config.json").write_text(json.dumps({"mm_vision_tower": "model"}))  # towers have none: not followed
    was = folder_identity(folder)
    for name in ("preprocessor_config.json", "config.json"):
        (tower / name).write_text('{"x": 1}')
        now = folder_identity(folder)
        assert changed(was, now) == {f"tower/{name}"}
        was = now
    save_file({"x": np.zeros(4, np.float32)}, tower / "model.safetensors")
    assert changed(was, folder_identity(folder)) == {"tower/weights"}


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-here/x", "a\0b"])
def test_a_tower_of_an_impossible_name_is_one_line(folder, name):
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": name}))
    with pytest.raises(GlimpseError, match=r"config\.json: mm_vision_tower: .*is not a path"):
        folder_identity(folder)


def test_what_decides_an_answer_goes_along_when_a_model_is_saved(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "tokenizer.model", "additional_chat_templates/default.jinja", "README.md"):
        (source / name).write_text("{}")
    with staged(tmp_path / "saved") as scratch:
        copy_beside(source, scratch)
    copied = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert copied == {"tokenizer.model", "additional_chat_templates/default.jinja"}
