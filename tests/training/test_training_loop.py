"""Parts of the training loop alone: what a store without folders, a signal, or a number that is not finite does to them."""

import io
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gp_jax.training import command, loop, validation
from gp_jax.training.early import early_stops, stop_early

pytestmark = pytest.mark.quick


class ObjectStore:
    """A path of a store that keeps names and bytes: making a folder does nothing, listing what is not there fails."""

    def __init__(self, path: str, objects: dict[str, bytes]):
        self.path, self.objects = path, objects

    def __truediv__(self, name: str) -> "ObjectStore":
        return ObjectStore(f"{self.path}/{name}", self.objects)

    def mkdir(self, **_: object) -> None:
        pass

    def iterdir(self):
        found = [name for name in self.objects if name.startswith(f"{self.path}/")]
        if not found:
            raise FileNotFoundError(self.path)
        return iter([ObjectStore(name, self.objects) for name in found])

    def open(self, mode: str):
        path, objects = self.path, self.objects

        class Sink(io.BytesIO):
            def close(self) -> None:
                objects[path] = self.getvalue()
                super().close()

        assert mode == "wb"
        return Sink()


def test_pictures_of_a_validation_go_to_stores_without_folders(monkeypatch):
    sample = SimpleNamespace(prompt=SimpleNamespace(count=2, slot_of_token=np.arange(2)))
    maker = SimpleNamespace(make=lambda record, suffix: sample, processor=None)
    source = [SimpleNamespace(id=f"a/b:{i}") for i in range(3)]
    feed = SimpleNamespace(
        loader=SimpleNamespace(maker=maker), sources=[source], schedule=SimpleNamespace(sources=[SimpleNamespace(suffix="")])
    )
    run = SimpleNamespace(vlm=SimpleNamespace(glimpse_config=SimpleNamespace(reduce_threshold=0.5)))
    log, objects = SimpleNamespace(picture=lambda *_: None), {}
    monkeypatch.setattr(validation, "picture", lambda *_: Image.new("RGB", (4, 4)))
    drawn = 0
    for numbers in ((2, 0), (1,)):
        logits = {(0, number): np.zeros(2) for number in numbers}
        drawn += validation.draw(feed, logits, run, 5, ObjectStore("gs://bucket/run", objects), log, drawn)
    folder = "gs://bucket/run/validation/step_0000005"
    assert list(objects) == [f"{folder}/{name}.png" for name in ("00_a_b_2", "01_a_b_0", "02_a_b_1")]
    assert all(content.startswith(b"\x89PNG") for content in objects.values())


def test_several_processes_agree_on_the_number_of_a_question(monkeypatch):
    """Not on a step: a validation asks too, and a resumed run's first step is not 1."""
    asked = []

    def reached(number: int) -> bool:
        asked.append(number)
        return number == 3

    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost_utils, "reached_preemption_sync_point", reached)
    before = signal.getsignal(signal.SIGTERM)
    with loop.Stop() as stop:
        assert signal.getsignal(signal.SIGTERM) is before, "JAX listens itself"
        assert [stop.now() for _ in range(5)] == [False, False, True, True, True]
    assert asked == [1, 2, 3] and stop.signal == signal.SIGTERM


def test_ctrl_c_ends_a_run_before_its_first_step_and_stops_it_later():
    with loop.Stop() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal is None
        stop.stepping = True
        signal.raise_signal(signal.SIGINT)
        assert stop.now() and stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # the second does not wait for the step


def test_a_signal_before_the_loop_listens_ends_the_process_well(monkeypatch):
    code = "import os, signal, time\nfrom gp_jax.training.early import early_stops\n"
    code += "with early_stops():\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "train.py: stopped before the first step\n"

    seen = []
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "train", lambda config: seen.append(signal.getsignal(signal.SIGTERM)) or {"signal": None})
    assert command.main(["--model", "m"]) == 0
    assert seen == [stop_early] and signal.getsignal(signal.SIGTERM) is before


def test_the_loop_takes_the_signal_over():
    with early_stops():
        with loop.Stop() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.now() and stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a run that was begun is not said to be stopped before its first step"
