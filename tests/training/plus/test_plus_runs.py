"""Whole runs of the stages `plus` and `sft`: what they leave, how they resume, on other devices, with rewards that are missing."""

import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import run_tools as tools
from safetensors.numpy import load_file

CONFIG = """
from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.models.adapter import AdapterConfig
from gp_jax.training.plus.settings import MasksConfig, PlusConfig, PolicyConfig
from gp_jax.training.rewards.settings import RewardConfig, RewardTerm
from gp_jax.training.settings import OptimConfig
train = PlusConfig(
    model={folder!r} + "/model",
    data=DataConfig(sources=(DataSource({folder!r} + "/data"),), validation=(DataSource({folder!r} + "/data", split="val"),), shapes=1),
    adapter=AdapterConfig(r=4, lora_alpha=8),
    masks=MasksConfig(predicted_share=0.25),
    policy=PolicyConfig(group_size=4, max_new_tokens=6, cut_completions="keep", beta=0.01, num_iterations=2),
    rewards=RewardConfig(terms=(RewardTerm({folder!r} + "/own_rewards.py:letters"), RewardTerm("exact_match"))),
    optim=OptimConfig(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0),
    batch_size=2, accumulation=2, steps=5, log_every=1, validate_every=4, save_every=2, samples_every=2, keep=2,
)
"""
REWARD = '''
async def letters(prompts, completions, completion_ids, **columns):
    """The share of small ids."""
    assert len(prompts) == len(completions) == len(columns["answer"])
    return [sum(id < 200 for id in ids) / len(ids) for ids in completion_ids]


def often_missing(completions, **_):
    return [None if i % 2 else 1.0 for i in range(len(completions))]
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tools.prepare(folder)
    (folder / "own_rewards.py").write_text(REWARD)
    path = folder / "plus.py"
    path.write_text(CONFIG.format(folder=str(folder)))
    return path


@pytest.fixture(scope="module")
def whole(home):
    """The uninterrupted run."""
    out = home.parent / "whole"
    tools.run(home, out)
    return out


def adapter(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "export" / "adapter_model.safetensors")


def assert_identical(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def samples(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(whole, home):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["group"] == "train"]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5]
    for name in (
        "reward",
        "reward_std",
        "reward/exact_match",
        "reward/0_data",
        "kl",
        "entropy",
        "completion_tokens",
        "cut",
        "flat",
        "missing",
    ):
        assert name in training[-1], name
    for name in ("clip_share", "rollout_gap", "largest_rollout_gap", "retention", "rollout_s", "reward_s", "update_s", "memory_gib"):
        assert name in training[-1], name
    assert max(line["largest_rollout_gap"] for line in training) < 1e-5
    assert training[-1]["compilations"] < training[0]["compilations"] / 10 and training[-1]["rollout_tokens_per_s"] > 0
    assert [line["step"] for line in lines if line["group"] == "validation"] == [4, 5]
    found = samples(whole)
    assert {line["step"] for line in found} == {0, 2, 4} and all(len(line["completions"]) == 4 for line in found)
    page = (whole / "samples.html").read_text()
    assert page.count("<article") == len(found) and all((whole / name).stat().st_size for line in found for name in line["pictures"])
    assert adapter(whole) and json.loads((whole / "export" / "adapter_config.json").read_text())["r"] == 4
    from gp_jax import GlimpseVLM

    vlm = GlimpseVLM.from_pretrained(home.parent / "model", adapter=whole / "export")
    assert any(np.abs(value).max() > 0 for name, value in adapter(whole).items() if "lora_B" in name)
    assert vlm.model.decoder.layers[0].self_attn.q_proj.adapter is not None


def start(home: Path, out: Path) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(tools.command(home, out), env=tools.environment(), **pipes)


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed(home, whole, tmp_path):
    """SIGKILL after a checkpoint, at a moment that differs from time to time: bit-identical in the end."""
    out = tmp_path / "killed"
    process = start(home, out)
    wait_for(lambda: process.poll() is not None or (out / "checkpoints" / "2").exists())
    time.sleep(random.uniform(0, 1.0))
    process.kill()
    process.communicate()
    tools.run(home, out)
    assert_identical(adapter(out), adapter(whole))
    assert samples(out) == samples(whole)
    assert tools.losses(out, field="reward") == tools.losses(whole, field="reward")


def test_missing_rewards_stop_the_run(home, tmp_path):
    own = home.parent / "missing.py"
    own.write_text(home.read_text().replace("own_rewards.py:letters", "own_rewards.py:often_missing"))
    done = subprocess.run(tools.command(own, tmp_path / "missing"), env=tools.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "8 of 16 completions have no reward" in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "missing" / "export").exists()


def test_supervised_answers(home, tmp_path):
    """The stage sft on parameters in full: the loss falls, and what is written is a plain model in which only they have changed."""
    full, instead = home.parent / "full.py", 'adapter=None, parameters=("decoder.layers.*.mlp.*",)'
    full.write_text(home.read_text().replace("adapter=AdapterConfig(r=4, lora_alpha=8)", instead))
    tools.run(full, tmp_path / "full", "--stage", "sft", "--steps", "6")
    curve = tools.losses(tmp_path / "full")
    assert curve[6] < curve[1]
    from gp_jax import GlimpseVLM

    found = GlimpseVLM.from_pretrained(tmp_path / "full" / "export").model.decoder.layers[0]
    before = GlimpseVLM.from_pretrained(home.parent / "model").model.decoder.layers[0]
    assert np.abs(found.mlp.up_proj.weight[...] - before.mlp.up_proj.weight[...]).max() > 0
    np.testing.assert_array_equal(found.self_attn.q_proj.weight[...], before.self_attn.q_proj.weight[...])


def test_two_processes_of_four_devices(home, whole, tmp_path):
    """The first two steps on eight devices, four questions at a time instead of two times two: within float32 noise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--steps", "2", "--batch-size", "4", "--accumulation", "1", "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    options += ["--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.processes", "2", "--mesh.process"]
    collectives = {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": os.environ.get("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")}
    processes = [
        subprocess.Popen(
            tools.command(home, tmp_path / "two", *options, str(number)),
            env=tools.environment(4) | collectives,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=400)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), said[0][-3000:] + said[1][-3000:]
    for field in ("reward", "kl", "entropy", "policy_loss", "grad_norm", "completion_tokens", "retention"):
        one, two = (tools.losses(out, field=field) for out in (whole, tmp_path / "two"))
        np.testing.assert_allclose([two[1], two[2]], [one[1], one[2]], rtol=1e-3, atol=2e-5, err_msg=field)
    one, two = ([line for line in samples(out) if line["step"] == 0] for out in (whole, tmp_path / "two"))
    texts = [sorted([said["text"] for said in line["completions"]] for line in lines) for lines in (one, two)]
    assert texts[0] == texts[1] and texts[0]
