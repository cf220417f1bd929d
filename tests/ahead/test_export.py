"""An exported folder answers as `generate` does in a process that cannot import gp_jax: the very lines of its README."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from PIL import Image

from gp_jax import GlimpseError, GlimpseVLM, Ladder, Ladders, Prune, artifact_inputs, cli, make_mesh
from gp_jax.ahead.artifact import write
from gp_jax.ahead.artifact.names import FACTS
from gp_jax.sharding import parameter_sharding
from gp_jax.tiny import CONFIG, make_checkpoint, make_picture

# `pip install jax orbax-checkpoint` and nothing else: these must not be needed.
WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gp_jax", "flax", "transformers", "PIL", "torch"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
"""

THREE_LAYERS = CONFIG | {"num_hidden_layers": 3, "vision_config": CONFIG["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}}
THREE_LAYERS |= {"selected_layers": [0], "reduce_layer": 1, "le_layers": [0, 1], "selected_visual_layers": [1]}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_checkpoint(folder / "model", hf_config=THREE_LAYERS)
    make_picture(folder / "scene.png")
    sizes = ["--batch", "2", "--visual-tokens", "200", "--prompt-length", "256", "--kept", "128", "--max-new-tokens", "6"]
    cli.run(["export", str(folder / "model"), "--to", str(folder / "out"), *sizes])
    return folder


def run_readme(folder: Path, code: str) -> str:
    """Runs code in an exported folder, without gp_jax. Returns: what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def test_the_readme_runs_without_gp_jax(home):
    """On the example that comes along, then on a batch that the export has not seen."""
    folder = home / "out"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "example.npz", "expected.npz", "export.json", "params", "processor", "program.jax_export", "vendor",
    }  # fmt: skip
    load, check, make = blocks(folder)
    assert len(load.splitlines()) == 10 and "gp_jax" not in load + check and "artifact_inputs" in make
    picture = Image.open(home / "scene.png")
    pictures, questions = (
        [picture.resize((224, 308)), [picture.resize((112, 56)), picture.resize((84, 140))]],
        ["Why is that so?", "Which?"],
    )
    np.savez(folder / "mine.npz", **artifact_inputs(folder, pictures, questions))
    unseen = 'mine = jax.jit(program.call)(params, dict(np.load(here / "mine.npz")))\nnp.savez(here / "out.npz", **mine)\n'
    printed = run_readme(folder, load + check + unseen)
    assert "as expected: True" in printed
    vlm, out = GlimpseVLM.from_pretrained(home / "model"), dict(np.load(folder / "out.npz"))
    raw = vlm.processor([[pictures[0]], pictures[1]], questions).inputs
    done = vlm.generate(**raw, max_new_tokens=6)
    np.testing.assert_array_equal(out["tokens"][:, : done.tokens.shape[1]], done.tokens)
    for b, keep in enumerate(done.keep):
        np.testing.assert_array_equal(out["keep"][b, : keep.size], keep)
        np.testing.assert_allclose(out["importance"][b, : keep.size], 1 / (1 + np.exp(-done.mask_logits[b])), atol=1e-5)
    assert out["kept"].tolist() == [keep.sum() for keep in done.keep]


def test_parameters_come_back_on_any_mesh(home, tmp_path):
    """What one device wrote on eight, for the same program; what eight wrote on eight in another arrangement."""
    folder, text = home / "out", GlimpseVLM.from_pretrained(home / "model").config.text
    program = jax.export.deserialize(bytearray((folder / "program.jax_export").read_bytes()))
    (shapes, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)

    def on(mesh: Mesh) -> dict:
        def placed(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = parameter_sharding(".".join(part.key for part in path), x.shape, mesh, text)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, shapes)

    mesh = make_mesh(2, 2, 2)
    params = ocp.load(folder / "params", on(mesh))
    embedding = params["decoder"]["embed_tokens"]
    assert embedding.sharding == NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    assert embedding.addressable_shards[0].data.shape == (272 // 2, 64 // 2)
    inputs = jax.device_put(dict(np.load(folder / "example.npz")), NamedSharding(mesh, PartitionSpec("data")))
    found, expected = jax.jit(program.call)(params, inputs), np.load(folder / "expected.npz")
    assert len(found["tokens"].sharding.device_set) == 8
    for name in ("tokens", "keep", "kept"):
        np.testing.assert_array_equal(found[name], expected[name])

    ocp.save(tmp_path / "again", params)
    again = ocp.load(tmp_path / "again", on(make_mesh(1, 4, 2)))
    assert again["decoder"]["embed_tokens"].addressable_shards[0].data.shape == (272 // 2, 64 // 4)
    jax.tree.map(np.testing.assert_array_equal, again, ocp.load(folder / "params"))


def test_every_platform_is_inside(home):
    program = jax.export.deserialize(bytearray((home / "out" / "program.jax_export").read_bytes()))
    assert program.platforms == ("cpu", "tpu", "cuda")
    assert "tpu_custom_call" in program.mlir_module(), "the TPU's attention kernel"
    facts = json.loads((home / "out" / "export.json").read_text())
    assert facts["plan"] == "glimpse" and facts["prune"]["reduce_threshold"] == 0.5 and facts["buckets"]["batch"] == [2]
    text = (home / "out" / "README.md").read_text()
    assert str(home) not in text and all(f"| `{name}` |" in text for name in artifact_inputs(home / "out", None, "Why?"))


def test_inputs_follow_the_request(home):
    picture = Image.open(home / "scene.png")
    folder, large = home / "out", picture.resize((900, 900))
    small = artifact_inputs(folder, large, "Which?")
    assert 100 < (small["image_slot"][0] >= 0).sum() <= 200
    several = artifact_inputs(folder, [[large, large.resize((900, 400))], None], ["Which?", "Why?"])
    assert 100 < (several["image_slot"][0] >= 0).sum() <= 200
    with pytest.raises(GlimpseError, match="ladder"):
        artifact_inputs(folder, large, "Which?", shrink=False)
    fits = picture.resize((392, 364))  # 182 tokens: what fits is left as it is
    assert (artifact_inputs(folder, fits, "Which?")["image_slot"][0] >= 0).sum() == 14 * 13
    with pytest.raises(GlimpseError, match="prompt.*ladder"):
        artifact_inputs(folder, large, "Which? " * 300)
    with pytest.raises(GlimpseError, match=r"prune: method 'fastv' is not what .*out was exported for, plan glimpse$"):
        artifact_inputs(folder, picture, "Which?", prune=Prune(method="fastv", fixed_remain_ratio=0.2))
    capped = artifact_inputs(folder, picture, "Which?", prune=Prune(max_remain_ratio=0.25))
    assert capped["cut0_cap"].tolist() == [48, 0] and artifact_inputs(folder, picture, "Which?")["cut0_cap"].tolist() == [192, 0]


def fails(capsys, monkeypatch, *argv: object) -> str:
    """Runs the command, which must exit 1 with one line on standard error. Returns: the line."""
    monkeypatch.setattr(sys, "argv", ["gp-jax", "export", *map(str, argv)])
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 1 and captured.err.count("\n") == 1
    return captured.err


def test_errors_are_one_line_and_leave_nothing(home, capsys, monkeypatch, tmp_path):
    model, to = home / "model", tmp_path / "out"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    for argv, message in (
        ([model], "--to is missing"),
        ([model, "--to", to, "--platforms", "cpu,gpu"], "--platforms: 'gpu' is not one of cpu, tpu, cuda"),
        ([model, "--to", tmp_path / "taken"], "exists and is not an earlier export"),
        ([model, "--to", to, "--batch", 0], "--batch 0 must be positive"),
        ([model, "--to", to, "--visual-tokens", 64, 64], "--visual-tokens 64 64 must be positive and different"),
        ([model, "--to", to, "--dtype", "int8"], "--dtype int8"),
        ([model, "--to", to, "--plan", "oracle"], "--plan oracle: needs more"),
        ([model, "--to", to, "--plan", "fastv"], "--plan fastv: say how much to keep"),
        ([model, "--to", to, "--plan", "glimps"], "did you mean 'glimpse'?"),
        ([model, "--to", to, "--image", tmp_path / "none.png"], "file is missing"),
        ([model, "--to", to, "--max-new-tokens", 9000], "--max-new-tokens 9000: the example"),
        ([model, "--to", "."], "--to .: exists and is not an earlier export"),
        ([tmp_path / "nowhere", "--to", to], "no such folder"),
    ):
        assert message in fails(capsys, monkeypatch, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_failed_export_leaves_the_old_one(home, monkeypatch):
    before = (home / "out" / "README.md").read_bytes()
    monkeypatch.setattr(write, "lower", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.run(["export", str(home / "model"), "--to", str(home / "out")])
    assert (home / "out" / "README.md").read_bytes() == before
    assert not (home / ".out.partial").exists()


def small_program(**more) -> write.ExportSettings:
    buckets = Ladders(Ladder("patches", (512,)), Ladder("prompt", (192,)), Ladder("kept", (64,)), batch=Ladder("batch", (1,)))
    return write.ExportSettings(Prune(), **dict(buckets=buckets, max_new_tokens=2, platforms=("cpu",)) | more)


@pytest.mark.parametrize("more, shrink, message", [({}, False, "ladder"), ({"max_new_tokens": 10_000}, True, "Ladders.decode")])
def test_an_example_that_is_too_large_is_found_before_the_work(home, monkeypatch, tmp_path, more, shrink, message):
    vlm, photo = GlimpseVLM.from_pretrained(home / "model"), Image.new("RGB", (1500, 1100), "red")
    monkeypatch.setattr(write, "lower", lambda *_: 1 / 0)
    with pytest.raises(GlimpseError, match=message):
        write.export(vlm, small_program(**more), tmp_path / "out", (photo, "Why?"), shrink)
    with pytest.raises(ZeroDivisionError):  # scaled down it is no obstacle
        write.export(vlm, small_program(), tmp_path / "out", (photo, "Why?"))


def earlier(folder: Path, text: str = "{}") -> Path:
    folder.mkdir()
    (folder / FACTS).write_text(text)
    return folder


def test_folders_that_cannot_be_replaced_are_refused_first(monkeypatch, tmp_path):
    monkeypatch.chdir(earlier(tmp_path / "here"))
    for name in (".", tmp_path / "here"):
        with pytest.raises(GlimpseError, match="is where this command runs"):
            write.check_target(Path(name))
    busy = earlier(tmp_path / "mount")

    def rename(self, target):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch, pytest.raises(GlimpseError, match=r"mount: cannot be replaced \(Device or resource busy\)"):
        patch.setattr(Path, "rename", rename)
        write.check_target(busy)
    write.check_target(busy)
    assert {path.name for path in tmp_path.iterdir()} == {"here", "mount"}


def test_an_earlier_export_is_never_lost(monkeypatch, tmp_path):
    old = earlier(tmp_path / ".out.old", "1")  # of a run that was killed between its two renames
    write.check_target(tmp_path / "out")
    assert (tmp_path / "out" / FACTS).read_text() == "1" and not old.exists()
    earlier(old, "0")  # killed behind them
    write.check_target(tmp_path / "out")
    assert (tmp_path / "out" / FACTS).read_text() == "1" and not old.exists()
    old.mkdir()
    (old / "thesis.txt").write_text("")
    with pytest.raises(GlimpseError, match="out.old is in the way"):
        write.check_target(tmp_path / "out")


def test_what_cannot_take_its_place_puts_the_old_one_back(home, monkeypatch, tmp_path):
    to, rename = earlier(tmp_path / "out", "1"), Path.rename

    def failing(self, target):
        if self.name == ".out.partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    vlm = GlimpseVLM.from_pretrained(home / "model")
    with pytest.raises(GlimpseError, match="cannot be written"):
        write.export(vlm, small_program(), to)
    assert (to / FACTS).read_text() == "1" and [path.name for path in tmp_path.iterdir()] == ["out"]
