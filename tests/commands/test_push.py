"""`gp-jax push`: the card holds the run's own figures, what is missing is named, and the Hub gets what lies in RUN/hub."""

import json

import huggingface_hub
import pytest

from gp_jax import GlimpseError
from gp_jax.commands import push

pytestmark = pytest.mark.quick

LINES = [
    {"step": 10, "group": "train", "loss": 2.5, "language": 1.25, "samples_per_s": 3.0},
    {"step": 20, "group": "train", "loss": 1.5, "language": 1.125, "samples_per_s": 3.25},
    {"step": 20, "group": "validation", "loss": 1.75, "f1": 0.625, "retention": 0.21},
]
CONFIG = {
    "model": "Qwen/Qwen3-VL-2B-Instruct",
    "dtype": "bfloat16",
    "batch_size": 1,
    "accumulation": 8,
    "seed": 0,
    "data": {"sources": [{"path": "/home/me/secret/gqa", "split": "train", "sampling": "random:20000"}]},
    "optim": {"name": "adamw", "learning_rate": 1e-4, "schedule": "cosine"},
}


@pytest.fixture
def finished(tmp_path):
    """The folder of a run that has ended."""
    folder = tmp_path / "run"
    (folder / "export").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "environment.json").write_text(json.dumps({"gp_jax": "0.1.0", "git_revision": "abc", "devices": "1 x H100"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name in ("glimpse.safetensors", "new_modules_gp.pt"):
        (folder / "export" / name).write_bytes(name.encode())
    (folder / "export" / "config.json").write_text(json.dumps({"reduce_layer": 18, "selected_visual_layers": [23, 17, 11, 5]}))
    return folder


def call(folder, *options):
    push.run(push.parse([str(folder), "--to", "me/glimpse", *options]))


def test_the_card_says_what_the_run_has_written(finished, tmp_path):
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "table.md").write_text("| plan | exact match |\n|---|---:|\n| glimpse | 71.5 |\n\nSee [it](table.json).\n")
    call(finished, "--dry-run", "--license", "apache-2.0", "--evaluation", str(tmp_path / "answers"))
    hub = finished / "hub"
    assert {path.name for path in hub.iterdir()} == {"README.md", "config.json", "glimpse.safetensors", "new_modules_gp.pt"}
    assert (hub / "new_modules_gp.pt").read_bytes() == (finished / "export" / "new_modules_gp.pt").read_bytes()
    card = (hub / "README.md").read_text()
    assert card.startswith("---\nbase_model: Qwen/Qwen3-VL-2B-Instruct\n") and "license: apache-2.0" in card
    for said in (
        "| steps | 20,",
        "| loss | 1.5 |",
        "| f1 | 0.625 |",
        "| retention | 0.21 |",
        "| glimpse | 71.5 |",
        "23, 17, 11, 5",
        "1 x H100",
    ):
        assert said in card, said
    assert "gqa (train, random:20000)" in card and "secret" not in card, "folders of the machine are not published"
    assert "table.json" not in card, "what links lead to is not published"
    assert 'from_pretrained("Qwen/Qwen3-VL-2B-Instruct", glimpse="me/glimpse"' in card


def test_what_is_missing_is_named(finished):
    with pytest.raises(GlimpseError, match="--to 'glimpse' must be OWNER/NAME"):
        push.run(push.parse([str(finished), "--to", "glimpse"]))
    (finished / "config.json").write_text(json.dumps(CONFIG | {"model": "models/base/x"}))
    with pytest.raises(GlimpseError, match="config.json: model=models/base/x is no Hub id; say which model it is with --base"):
        call(finished, "--dry-run")
    call(finished, "--dry-run", "--base", "Qwen/Qwen3-VL-2B-Instruct")
    with (finished / "metrics.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(GlimpseError, match="metrics.jsonl: line 4"):
        call(finished, "--dry-run", "--base", "a/b")
    (finished / "export" / "new_modules_gp.pt").unlink()
    with pytest.raises(GlimpseError, match="export: new_modules_gp.pt is missing"):
        call(finished, "--dry-run", "--base", "a/b")
    (finished / "export" / "glimpse.safetensors").unlink()
    with pytest.raises(GlimpseError, match="holds no glimpse and no adapter; a run writes it when it ends"):
        call(finished, "--dry-run", "--base", "a/b")


def test_the_hub_gets_that_folder(finished, monkeypatch, capsys):
    calls = []

    class Hub:
        def __init__(self, **options):
            pass

        def create_repo(self, name, **options):
            calls.append(("create", name, options["private"]))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    call(finished, "--private")
    names = ["README.md", "config.json", "glimpse.safetensors", "new_modules_gp.pt"]
    assert calls == [("create", "me/glimpse", True), ("upload", "me/glimpse", names)]
    assert "published https://huggingface.co/me/glimpse" in capsys.readouterr().out
    monkeypatch.setattr(Hub, "create_repo", lambda *a, **k: (_ for _ in ()).throw(OSError("no login")))
    with pytest.raises(GlimpseError, match="the Hugging Face Hub did not take it .OSError: no login.; .*hub stays"):
        call(finished)
