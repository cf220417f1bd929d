"""Checkpoints of a run: what is kept, what is refused, what a damaged one does."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from gp_jax import GlimpseError
from gp_jax.training.checkpoint import Checkpoints, checksum, differences, quiet

IDENTITY = {"optim": {"rate": 0.1}, "sources": ["a", "b"]}


def state(step: int) -> dict:
    """Leaves in another order than their names: a tree of dicts sorts, a dataclass does not."""
    return {"z": jnp.full((300,), float(step)), "a": (jnp.asarray(step), jnp.arange(5.0) * step)}


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "checkpoints"


def opened(folder, said=None, identity=IDENTITY, keep=2) -> Checkpoints:
    return Checkpoints(folder, identity, keep, (said if said is not None else []).append)


def fill(folder, steps=6, best=2) -> Checkpoints:
    checkpoints = opened(folder)
    for step in range(1, steps + 1):
        checkpoints.save(step, state(step), loss=0.1 if step == best else 1.0 if step == best + 1 else None)
    checkpoints.close()
    return checkpoints


def test_the_newest_and_the_best_are_kept(folder):
    assert fill(folder).steps() == [6, 5, 2]
    restored = opened(folder).restore(state(0))
    assert restored.step == 6
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(6))
    assert opened(folder / "none").restore(state(0)) is None


def test_what_is_saved_is_the_state_at_that_moment(folder):
    """Donated memory is used again at once; on CPU the writer would otherwise read what came after."""
    checkpoints, step = opened(folder), jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    current = {"x": jnp.zeros(2_000_000)}
    for number in range(4):
        checkpoints.save(number, current)
        current = step(current)
    checkpoints.close()
    assert float(opened(folder).restore({"x": jnp.zeros(2_000_000)}).state["x"].max()) == 3.0


def test_saving_a_step_again_changes_nothing(folder):
    fill(folder)
    checkpoints = opened(folder)
    checkpoints.save(6, state(99), wait=True)
    assert int(checkpoints.restore(state(0)).state["a"][0]) == 6


@pytest.mark.parametrize("damage", ["no metadata", "bytes", "empty files", "no arrays"])
def test_damaged_checkpoints_are_set_aside(folder, damage):
    import shutil

    fill(folder)
    newest = folder / "6"
    if damage == "no metadata":
        (newest / "_CHECKPOINT_METADATA").unlink()
    elif damage == "no arrays":
        shutil.rmtree(newest / "state")
    for path in Path(newest).rglob("*") if damage in ("bytes", "empty files") else ():
        if not path.is_dir() and path.parent.name == "d":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(bytes(content) if damage == "bytes" else b"")
    said: list[str] = []
    checkpoints = opened(folder, said)
    restored = checkpoints.restore(state(0))
    assert restored.step == 5 and int(restored.state["a"][0]) == 5
    assert len(said) == 1 and "/6 is damaged" in said[0] and (folder / "damaged-6").exists()
    checkpoints.save(6, state(6), wait=True)  # its step comes again
    checkpoints.close()
    assert opened(folder).restore(state(0)).step == 6


@pytest.mark.parametrize("step, damage", [(6, ""), (2, "[]"), (2, '{"loss": null}')])
def test_damaged_losses_are_set_aside(folder, step, damage):
    """Of the newest, and of an older one: orbax reads all of them before it saves."""
    checkpoints = opened(folder)
    for number in (2, 5, 6):
        checkpoints.save(number, state(number), loss=float(number))
    checkpoints.close()
    (folder / str(step) / "metrics" / "metrics").write_text(damage)
    said: list[str] = []
    checkpoints = opened(folder, said)
    assert checkpoints.restore(state(0)).step == (5 if step == 6 else 6)
    assert len(said) == 1 and f"/{step} is damaged" in said[0]
    checkpoints.save(7, state(7), loss=0.0, wait=True)
    checkpoints.close()
    assert opened(folder).steps()[0] == 7


def test_a_loss_that_is_not_finite_is_not_the_best(folder):
    checkpoints = opened(folder, keep=1)
    for step, loss in enumerate((0.5, float("nan"), 0.7, float("-inf"), None), 1):
        checkpoints.save(step, state(step), loss=loss)
    checkpoints.close()
    assert checkpoints.steps() == [5, 1]


def test_values_that_are_not_those_saved_are_noticed(folder):
    """A checkpoint that reads well, but holds something else."""
    import json

    fill(folder)
    path = folder / "6" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["checksum"] += 1
    path.write_text(json.dumps(content))
    said: list[str] = []
    assert opened(folder, said).restore(state(0)).step == 5 and "do not match their checksum" in said[0]


def test_a_run_does_not_quietly_start_over(folder):
    fill(folder)
    for step in (2, 5):
        (folder / str(step) / "_CHECKPOINT_METADATA").write_text("{")
    (folder / "6" / "metrics").mkdir()
    (folder / "6" / "metrics" / "metrics").write_text("{")
    with pytest.raises(GlimpseError, match="no checkpoint can be read"):
        opened(folder).restore(state(0))


def test_another_configuration_is_refused(folder):
    fill(folder)
    with pytest.raises(GlimpseError, match=r"optim.rate: 0.1 in the checkpoint, 0.2 now; sources\[1\]: 'b' in the checkpoint, 'c' now"):
        opened(folder, identity={"optim": {"rate": 0.2}, "sources": ["a", "c"]}).restore(state(0))
    assert opened(folder).steps() == [6, 5, 2], "nothing was lost"


def test_differences():
    assert differences({"a": 1}, {"a": 1}) == []
    assert differences({"a": 1}, {"b": 2}) == ["a: 1 in the checkpoint, None now", "b: None in the checkpoint, 2 now"]
    assert differences({"a": 1, "gone": 0.0}, {"a": 1, "added": False}) == [], "a setting that is off where it is known"
    assert differences({"a": 0}, {"a": None}) == ["a: 0 in the checkpoint, None now"], "both say something"
    assert differences({"records": {"evidence": ["x"]}, "weights": "y"}, {"records": {"evidence": ["z"]}}) == [
        "records.evidence[0]: 'x' in the checkpoint, 'z' now",
        "weights: 'y' in the checkpoint, None now",
    ]
    assert differences([1], [1, 2], "x") == ["x: [1] in the checkpoint, [1, 2] now"]


def test_checksum_sees_every_bit():
    assert checksum(state(1)) == checksum(state(1)) != checksum(state(2))
    assert checksum({"x": np.float32(0.0)}) != checksum({"x": np.float32(-0.0)})


def test_writes_that_end_after_another_failed_print_nothing(capsys):
    before = sys.excepthook
    with quiet():
        sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
        sys.excepthook(RuntimeError, RuntimeError("another"), None)
    assert sys.excepthook is before
    assert capsys.readouterr().err == "RuntimeError: another\n"
