"""A loop around a step of two additions: stopped anywhere it logs, validates and keeps what an uninterrupted run does; a full disk."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.tree_util import register_dataclass
from run_tools import full_disk

from gp_jax import GlimpseError
from gp_jax.data.feed import LoadedBatch
from gp_jax.runtime.lock import only_one
from gp_jax.training import loop
from gp_jax.training.checkpoint import Checkpoints, run_folder
from gp_jax.training.places import alone
from gp_jax.training.run_log import RunLog
from gp_jax.training.settings import TrainConfig

STEPS = 7


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    x: jax.Array  # (1,) float


class Feed:
    """Micro-batch n holds n."""

    def load(self, start: int, end: int):
        return (LoadedBatch(n, None, Batch(np.float32([n])), (0,)) for n in range(start, end))

    def counts(self, step: int) -> None:
        return None

    def sizes(self, step: int) -> tuple[int, int]:
        return 1, step

    def epoch(self, step: int) -> float:
        return step / STEPS


class Stop:
    """Says so at the question with this number."""

    def __init__(self, at: int | None = None):
        self.at, self.asked, self.signal = at, 0, None

    def now(self) -> bool:
        self.asked += 1
        if self.asked == self.at:
            self.signal = signal.SIGTERM
        return self.signal is not None


def make(out: Path, **changes) -> loop.Loop:
    """Validates every 2nd step, three questions each; logs every 3rd, saves every 4th."""

    def start():
        return {"step": jnp.int32(0), "sum": jnp.float32(0)}, jnp.float32(0)

    def update(state, gathered):
        after = {"step": state["step"] + 1, "sum": state["sum"] + gathered}
        loss = jnp.sin(after["sum"]) / 3
        metrics = {"loss": loss, "learning_rate": jnp.float32(0.1) * after["step"], "bad": jnp.int32(-1)}
        return after, jnp.float32(0), metrics

    def validate(state, step, folder, log, bar, stopped):
        for _ in range(3):
            if stopped():
                return None
        found = {"loss": float(jnp.cos(state["sum"]))}
        log.write(step, found, "validation")
        return found

    step = SimpleNamespace(start=start, update=update, accumulate=lambda gathered, state, batch, counts: gathered + batch.x[0] / 3)
    config = TrainConfig(out=str(out), batch_size=1, accumulation=1, steps=STEPS, log_every=3, validate_every=2, save_every=4, keep=2)
    config = dataclasses.replace(config, **changes)
    run = SimpleNamespace(config=config, step=step, feed=Feed(), steps=STEPS, mesh=None, identity={"a": 1})
    shown = dict(shown=("loss",), validation_shown=("loss",), losses=("loss",))
    stage = SimpleNamespace(run=run, validate=validate, summary=dict, take=None, **shown)
    return loop.Loop(stage)


def kept(out: Path) -> tuple:
    """Its checkpoints with their losses, and the state in the newest."""
    losses = {path.parent.parent.name: json.loads(path.read_text()) for path in (out / "checkpoints").glob("*/metrics/metrics")}
    checkpoints = Checkpoints(epath.Path(out) / "checkpoints", {"a": 1}, 2)
    state = checkpoints.restore({"step": jnp.int32(0), "sum": jnp.float32(0)}).state
    return losses, checkpoints.steps(), float(state["sum"])


def left(out: Path) -> tuple:
    """What a run left: its lines without speeds, and checkpoints."""
    speeds = ("samples_per_s", "tokens_per_s", "memory_gib")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in speeds} for line in lines], kept(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert make(out).go(Stop()) is None
    found = left(out)
    assert [(line["step"], line["group"]) for line in found[0]] == [
        *((2, "validation"), (3, "train"), (4, "validation")),
        *((6, "train"), (6, "validation"), (7, "train"), (7, "validation")),
    ]
    return found


@pytest.mark.parametrize("first", [2, 4, 7, 19])
def test_a_stop_anywhere_loses_nothing(whole, tmp_path, first):
    """Behind a step, where a validation is due, in the midst of one, behind the last step; and then once more."""
    out, stops = tmp_path / "run", [Stop(first), Stop(1), Stop()]
    ends = [make(out).go(stop) for stop in stops]
    assert ends[-1] is None and left(out) == whole
    assert ends[0] == signal.SIGTERM, "a run that owes a validation is not done"


def test_a_kill_behind_a_checkpoint_loses_no_window(whole, tmp_path, monkeypatch):
    """Step 4 is saved between two log lines, step 6 has its validation in the log but no checkpoint."""
    out = tmp_path / "run"
    killed = make(out)
    save = killed.save

    def die(step: int, *rest, **options) -> None:
        if step == 6:
            raise KeyboardInterrupt
        save(step, *rest, **options)

    killed.save = die
    with pytest.raises(KeyboardInterrupt):
        killed.go(Stop())
    killed.checkpoints.close()
    killed.log.close()
    assert make(out).go(Stop()) is None and left(out) == whole


DAMAGE = {
    "bytes": (lambda path: path.write_bytes(path.read_bytes() + b"\xff\xfe\n"), "1 of its lines cannot be read"),
    "half a line": (lambda path: path.write_bytes(path.read_bytes() + b'{"step": 3, "gro'), None),
    "nonsense": (
        lambda path: path.write_bytes(path.read_bytes() + b'[]\n{"step": "3"}\n{"step": true}\n' + b"[" * 9999 + b"\n"),
        "4 of its lines",
    ),
    "folder": (lambda path: (path.rename(path.with_name("old")), path.mkdir()), "is a folder"),
    "FIFO": (lambda path: (path.rename(path.with_name("old")), os.mkfifo(path)), "is not a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_is_set_aside(tmp_path, damage):
    folder, said = epath.Path(tmp_path), []
    log = RunLog(folder, 0, said.append)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step}, "train")
    log.close()
    path = tmp_path / "metrics.jsonl"
    spoil, reason = DAMAGE[damage]
    spoil(path)
    log = RunLog(folder, 2, said.append)
    log.write(3, {"loss": 9.0}, "train")
    log.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == ([3] if damage in ("folder", "FIFO") else [1, 2, 3])
    assert len(said) == (reason is not None) and all(reason in line and "metrics.jsonl.damaged" in line for line in said)
    assert (tmp_path / "metrics.jsonl.damaged").exists() == bool(said)


def test_events_of_a_run_that_goes_on_hide_those_behind_its_step(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    for step in (0, 2):
        log = RunLog(epath.Path(tmp_path), step)
        log.write(step + 1, {"loss": 0.5}, "train")
        log.close()
        (found,) = (tmp_path / "tensorboard").iterdir()
        data, events = found.read_bytes(), []
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        found.unlink()  # two within a second share a name
    assert events[0].file_version == "brain.Event:2" and events[1].session_log.status == 1 and events[1].step == 3
    assert (events[2].step, events[2].summary.value[0].tag, events[2].summary.value[0].simple_value) == (3, "train/loss", 0.5)


@pytest.mark.parametrize("room", [0, 300])
def test_a_full_disk_is_one_line_and_nothing_is_lost(whole, tmp_path, caplog, monkeypatch, room):
    """When the run's facts, the log, or a checkpoint are written."""
    monkeypatch.setattr(loop, "say", lambda line: None)  # pytest keeps what is said in a file
    monkeypatch.setattr(loop, "environment", dict)
    monkeypatch.setattr(loop, "plain", lambda config: {})
    out = tmp_path / "run"
    make(out).go(Stop(6))
    before = kept(out)
    with full_disk(room), pytest.raises(GlimpseError, match=rf"{out}.*cannot be written \(.*(File too large|EFBIG)") as caught:
        make(out).go(Stop())
    assert "\n" not in str(caught.value) and not caplog.records
    assert kept(out) == before
    assert make(out).go(Stop()) is None and left(out) == whole


def test_a_second_run_is_refused_before_it_writes(tmp_path):
    out = tmp_path / "run"
    with (
        only_one(out, "train.py"),
        pytest.raises(GlimpseError, match=f"{out}: train.py, process {os.getpid()} .* is writing there"),
        alone(str(out)),
    ):
        pass
    with alone(str(out)):
        assert (out / ".lock").exists()
    assert not out.exists(), "nothing was written"


def test_the_processes_of_a_run_are_one(tmp_path, monkeypatch):
    """The second neither takes the lock nor is refused, unless the first is."""
    told = []
    monkeypatch.setattr("gp_jax.training.places.jax.process_count", lambda: 2)
    monkeypatch.setattr("gp_jax.training.places.jax.process_index", lambda: 1)
    monkeypatch.setattr(
        "gp_jax.training.places.multihost_utils.broadcast_one_to_all", lambda refused: told.append(int(refused)) or told[-1]
    )
    with only_one(tmp_path, "train.py"), alone(str(tmp_path)):
        assert told == [0]
    monkeypatch.setattr("gp_jax.training.places.multihost_utils.broadcast_one_to_all", lambda refused: 1)
    with pytest.raises(GlimpseError, match="the first process may not write there"), alone(str(tmp_path)):
        pass


@pytest.mark.parametrize("name", ["file", "pipe", "~nobody-here/x", "x" * 300, "null\0", "nostore://x", "half\ud800", "file/below"])
def test_names_that_cannot_be_a_run(tmp_path, name):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GlimpseError), alone(name if name[0] == "~" or "://" in name else str(tmp_path / name)):
        pass
    assert run_folder("~") == epath.Path(Path.home())
