"""Whole runs of `train.py`: killed, stopped, damaged, on other devices; all end where the uninterrupted run ends."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import run_tools as tools
from safetensors.numpy import load_file

from gp_jax.pretrained.torch_file import read_torch


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tools.prepare(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def whole(home):
    """The uninterrupted run."""
    out = home.parent / "whole"
    out.parent.mkdir(exist_ok=True)
    tools.run(home, out)
    return out


def glimpse(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "export" / "glimpse.safetensors")


def assert_identical(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_run_leaves_what_it_promises(whole, home):
    curve = tools.losses(whole)
    assert list(curve) == list(range(1, 13))
    line = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert {"language", "dice", "bce", "precision", "recall", "f1", "iou", "retention", "grad_norm", "update_norm", "learning_rate"} <= set(
        line
    )
    assert line["samples_per_s"] > 0 and line["tokens_per_s"] > 0 and line["memory_gib"] > 0
    assert set(tools.losses(whole, "validation")) == {12}
    pictures = sorted((whole / "validation" / "step_0000012").glob("*.png"))
    assert len(pictures) == 2
    assert list((whole / "tensorboard").glob("events.*"))
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["packages"]["jax"] and "git_revision" in environment
    assert json.loads((whole / "config.json").read_text())["optim"]["learning_rate"] == 1e-3
    assert sorted(int(p.name) for p in (whole / "checkpoints").iterdir() if p.name.isdecimal()) == [4, 6, 8, 10, 12]

    tensors, released = glimpse(whole), read_torch(whole / "export" / "new_modules_gp.pt")
    assert_identical(tensors, released)
    from orbax.checkpoint import v1 as ocp

    assert_identical(tensors, {name: np.asarray(value) for name, value in ocp.load(whole / "export" / "orbax").items()})
    from gp_jax import GlimpseVLM

    vlm = GlimpseVLM.from_pretrained(home.parent / "model", glimpse=whole / "export")
    assert vlm.glimpse_config.attn_fuse_size == 16
    np.testing.assert_array_equal(vlm.model.glimpse.learnable_embeddings[...], tensors["learnable_embeddings"])


def newest(out: Path) -> int:
    """Step of the newest finished checkpoint."""
    folder = out / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=0) if folder.exists() else 0


def test_stopped_and_killed(home, whole, tmp_path):
    """SIGTERM, which saves, then SIGKILL at random moments, some of them while a checkpoint is written: bit-identical in the end."""
    out, rng, started = tmp_path / "stopped", random.Random(0), tools.environment()
    words = tools.command(home, out, "--save-every", "1000")
    process = subprocess.Popen(words, env=started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on from here" in stdout
    assert 3 <= newest(out) < 12
    for waits in (False, True):  # for progress: otherwise a slow machine would only ever be killed while it imports
        process = subprocess.Popen(tools.command(home, out), env=started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, deadline = newest(out), time.monotonic() + (60 if waits else rng.uniform(0.5, 4))
        while time.monotonic() < deadline and process.poll() is None and (not waits or newest(out) <= before):
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.wait()
    reached, done = newest(out), tools.run(home, out)
    assert reached >= 3 and f"going on from step {reached} of 12" in done.stdout
    assert_identical(glimpse(out), glimpse(whole))
    assert tools.losses(out) == tools.losses(whole)


def copy(source: Path, target: Path) -> Path:
    """A finished run without its export, to be gone on with."""
    import shutil

    shutil.copytree(source, target)
    shutil.rmtree(target / "export")
    return target


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(home, whole, tmp_path):
    """One way of damage through a whole run; test_checkpoint.py has the others."""
    out = copy(whole, tmp_path / "damaged")
    files = [path for path in (out / "checkpoints" / "12" / "state").rglob("*") if path.is_file() and path.stat().st_size > 100]
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    done = tools.run(home, out)
    assert re.search(r"checkpoint .*/12 is damaged", done.stdout) and "going on from step 10" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert_identical(glimpse(out), glimpse(whole))


def test_a_checkpoint_of_another_configuration_is_refused(home, whole):
    options = ("--optim.learning-rate", "0.5", "--data.seed", "7", "--mesh.fsdp", "1", "--log-every", "3")
    done = subprocess.run(tools.command(home, whole, *options), env=tools.environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "optim.learning_rate: 0.001 in the checkpoint, 0.5 now" in done.stderr and "data.seed: 42 in the checkpoint, 7 now" in done.stderr
    )
    assert "mesh" not in done.stderr.split("another configuration")[1] and "log_every" not in done.stderr


def close(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5)


def start_two(home, out, *options) -> list[subprocess.Popen]:
    """Two processes with four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mesh = (
        "--mesh.data",
        "2",
        "--mesh.fsdp",
        "1",
        "--mesh.tensor",
        "4",
        "--mesh.coordinator",
        f"localhost:{port}",
        "--mesh.processes",
        "2",
    )
    pipes = dict(env=tools.environment(4), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [subprocess.Popen(tools.command(home, out, *options, *mesh, "--mesh.process", str(number)), **pipes) for number in range(2)]


def test_other_devices_go_on_with_a_run(home, whole, tmp_path):
    """Two processes of four devices take over at step 4 what one device began; a notice to one of them stops both behind the same step;
    and one process of four devices ends where one device ends."""
    out = copy(whole, tmp_path / "moved")
    for step in (6, 8, 10, 12):
        (out / "checkpoints" / str(step)).rename(tmp_path / str(step))
    processes = start_two(home, out, "--save-every", "1")
    while newest(out) < 5:
        assert processes[0].poll() is None, processes[0].stdout.read()
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "8 device(s) in 2 process(es)" in said[0] and "going on from step 4" in said[0] and 5 <= newest(out) < 12
    assert "the same command goes on from here" in said[0] and "the same command" not in said[1]

    done = tools.run(home, out, "--mesh.data", "2", "--mesh.fsdp", "1", "--mesh.tensor", "2", devices=4)
    assert "going on from step" in done.stdout and "4 device(s)" in done.stdout and "done:" in done.stdout
    close(tools.losses(out), tools.losses(whole))
    assert glimpse(out).keys() == glimpse(whole).keys() and os.listdir(out / "validation")
    for name, value in glimpse(whole).items():
        np.testing.assert_allclose(glimpse(out)[name], value, atol=2e-4)


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_batch(home, tmp_path):
    out = tmp_path / "nan"
    options = ("--optim.learning-rate", "1e30", "--optim.clip-norm", "0", "--optim.warmup-ratio", "0", "--save-every", "1")
    done = subprocess.run(
        tools.command(home, out, *options), env=tools.environment() | {"GP_JAX_TRACEBACK": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1
    match = re.search(r"train.py: step (\d+): loss or gradient is not finite \(.*\); its records are shapes.jsonl:\d+, ", done.stderr)
    assert match, done.stderr
    assert newest(out) == int(match[1]) - 1 and not (out / "export").exists()
    exported = out / "last_good" / "export"
    assert done.stderr.endswith(f"--glimpse-from {exported}\n")
    assert all(np.isfinite(value).all() for value in load_file(exported / "glimpse.safetensors").values())
