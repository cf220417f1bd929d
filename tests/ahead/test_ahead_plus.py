"""A step of the stage `plus` compiled for TPUs that are not here: with fake devices in their place, and with the TPU compiler."""

import contextlib
import importlib.util
import json
import math
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from gp_jax import GlimpseError
from gp_jax.ahead import compiling, plus, training
from gp_jax.ahead.plus import compile_plus, small_models, whole
from gp_jax.ahead.plus_fit import Questions, facts, report
from gp_jax.commands import compile as command
from gp_jax.models.adapter import AdapterConfig, adapted, attach
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.hf_config import model_config
from gp_jax.pretrained.known import SIZES
from gp_jax.pretrained.params import abstract_model
from gp_jax.sharding import make_mesh
from gp_jax.tiny import CONFIG as SIX_LAYERS
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.plus.losses import METRICS, policy_losses
from gp_jax.training.plus.run import is_trained, trained
from gp_jax.training.plus.settings import PlusConfig, PolicyConfig
from gp_jax.training.step import StepPrograms
from tests.ahead.test_ahead import command_line

CONFIG = SIX_LAYERS | {"num_hidden_layers": 3, "vision_config": SIX_LAYERS["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}}
CONFIG |= {"selected_layers": [0], "reduce_layer": 1, "le_layers": [0, 1], "selected_visual_layers": [1]}
ASKED = Questions(batch=4, visual_tokens=150, prompt_tokens=20, answer_tokens=8, retention=0.2, group=2, after=1)
MESH = dict(fsdp=4, tensor=2, dtype="float32")
RANK = 4
libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")


def fake(patch: pytest.MonkeyPatch) -> None:
    """Eight devices that are here instead of a topology."""
    patch.setattr(training, "topology_devices", lambda topology: jax.devices())
    for module in (compiling, training):
        patch.setattr(module, "targeting", lambda backend: contextlib.nullcontext())


@pytest.fixture(scope="module")
def fits():
    """Without the KL pass, and with it and two micro-batches."""
    config, twice = model_config(CONFIG, {}), Questions(**vars(ASKED) | {"accumulation": 2})
    with pytest.MonkeyPatch.context() as patch:
        fake(patch)
        options = MESH | {"rank": RANK}
        return compile_plus(config, "v5e:2x4", ASKED, **options), compile_plus(config, "v5e:2x4", twice, beta=0.04, **options)


def test_the_rollout_is_the_engines(fits):
    names = [p.name for p in fits[0].programs]
    assert [name for name in names if "176" in name] == ["embed, 176 rows", "rope angles, 176 rows", "layer, 176 rows"]
    for name in ("compact to 64 rows", "layer, 64 rows", "start", "decode, cache of 64 rows", "pick"):
        assert name in names, "up to the cut, behind it, completions, and a micro-batch of the pictures"
    assert fits[0].lengths == {"visual": 160, "prompt": 176, "kept": 64}, "150 + 20 rows; 30 + 20 of them stay"


def test_what_is_on_a_chip(fits):
    one, two = fits
    text = model_config(CONFIG, {}).text
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    pairs = [(width, heads), *[(width, text.num_key_value_heads * text.head_dim)] * 2, (heads, width)]
    pairs += [(width, text.intermediate_size)] * 3
    assert one.parameters == text.num_hidden_layers * RANK * sum(map(sum, pairs))
    assert 4 * one.parameters / 8 <= one.gradients < 4 * one.parameters / 2 and one.adapter == 2 * one.gradients, "split by the table"
    assert 2 * one.gradients < one.optimizer < 2.1 * one.gradients
    assert one.held == one.base + one.adapter + one.optimizer + one.gradients and one.base == two.base
    assert [phase.name for phase in one.phases] == ["rollout", "accumulate", "update"]
    for fit in fits:
        assert all(phase.total == fit.held + phase.values + phase.temporary for phase in fit.phases)
        assert fit.total == max(phase.total for phase in fit.phases) and fit.fits and fit.chips == 8
    for before, after in zip(one.phases, two.phases, strict=True):
        assert after.values > before.values, "the pictures and caches of twice as many questions"
    assert two.phases[1].temporary >= one.phases[1].temporary, "the KL pass reads the prompts once more"


def test_a_whole_model_from_small_ones():
    config = SIZES["7b"]
    assert small_models(config, 18) == [(4, 1), (6, 3), (6, 1)] and small_models(config, None) == [(2, None), (4, None)]
    assert small_models(config, 26) == [(3, 1), (5, 3)], "the one layer behind the cut is in both"
    assert small_models(model_config(SIX_LAYERS, {}), 3) == [(6, 3)]

    def bytes_needed(depth, after):
        front = depth if after is None else after + 1
        return 1000 + 70 * front + 20 * (depth - front)

    for after in (18, None, 26):
        models = small_models(config, after)
        assert whole([bytes_needed(*model) for model in models], models, 28, after) == pytest.approx(bytes_needed(28, after), abs=1)
    assert whole([77], [(28, 18)], 28, 18) == 77


def test_reports(fits):
    one, two = map(report, fits)
    assert "8 chips (data=1 fsdp=4 tensor=2)" in one and "160 visual, 176 prompt, 64 kept, 8 answer" in one
    assert "4 questions x 2 completions; adapter of rank 4" in one and "GiB of 15.75 GiB: fits" in one
    assert "update without a KL pass\n" in one and "update with the KL pass (beta 0.04)\n" in two, "of the whole model, a small one"
    assert "4 questions x 2 micro-batches x 2 completions" in two
    found = json.loads(json.dumps(facts(fits[0])))
    assert found["fits"] is True and found["phases"][0]["most"] in {p["name"] for p in found["programs"]}
    assert found["total"] == fits[0].total and found["questions"]["group"] == 2


def test_the_state_is_that_of_a_run():
    """Shapes, types and places of what a run starts with."""
    mesh, settings = make_mesh(1, 4, 2), PlusConfig(adapter=AdapterConfig(r=RANK))
    config = model_config(CONFIG, {})
    model = trained(LVLM(config, None, rngs=nnx.Rngs(0)), settings, mesh)
    abstract = compiling.placed(attach(abstract_model(config, None, np.float32), settings.adapter, abstract=True), mesh)
    assert [path for path, _ in adapted(abstract)] == [path for path, _ in adapted(model)]
    losses = partial(policy_losses, config=PolicyConfig(), remat=True, attention="auto")
    rest = METRICS, optimizer(settings.optim, 9), learning_rate(settings.optim, 9)
    steps = [StepPrograms(each, is_trained(settings), losses, *rest, mesh=mesh) for each in (model, abstract)]
    made = steps[0].start(), training.started(steps[1])
    found, expected = (jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), each) for each in made)
    assert jax.tree.structure(found) == jax.tree.structure(expected) and jax.tree.leaves(found) == jax.tree.leaves(expected)
    split = [place for place in jax.tree.leaves(steps[0].places) if not place.is_fully_replicated]
    assert len(split) == 4 * len(jax.tree.leaves(steps[0].params)), "parameters, two moments and gradients"


def test_what_does_not_fit_is_one_line(monkeypatch):
    fake(monkeypatch)
    config = model_config(CONFIG, {})
    with pytest.raises(GlimpseError, match="--batch 3 is not a multiple of data x fsdp = 4"):
        compile_plus(config, "v5e:2x4", Questions(**vars(ASKED) | {"batch": 3}), **MESH)
    with pytest.raises(GlimpseError, match=r"policy.group_size=1: a group needs at least 2"):
        compile_plus(config, "v5e:2x4", Questions(**vars(ASKED) | {"group": 1}), **MESH)
    monkeypatch.setattr(plus, "hbm_bytes", lambda topology: 2**20)
    with pytest.raises(GlimpseError, match=r"v5e:2x4: weights, adapter and optimiser alone need 0\.\d\d GiB of 0\.00 GiB per chip"):
        compile_plus(config, "v5e:2x4", ASKED, rank=256, **MESH)


@pytest.mark.parametrize(
    "argv, questions, options",
    [
        ([], dict(batch=16, visual_tokens=2048, answer_tokens=128, group=8, accumulation=1, after=18), dict(beta=0.0, rank=32, fsdp=-1)),
        (["--plan", "dense", "--beta", "0.04", "--tensor", "4"], dict(after=None), dict(beta=0.04, fsdp=-1, tensor=4)),
    ],
)
def test_the_command_asks_for_what_is_given(monkeypatch, capsys, argv, questions, options):
    asked = []

    def compiled(config, topology, questions, **options):
        asked.append((topology, vars(questions), options))
        raise GlimpseError("far enough")

    monkeypatch.setattr(plus, "compile_plus", compiled)
    args = command.parse(["--what", "plus", "--model", "7b", *argv])
    with pytest.raises(GlimpseError, match="far enough"):
        command.plus(args, *command.model_named("7b"), args.sizes())
    topology, found, given = asked[0]
    assert topology == "v5e:4x4" and questions.items() <= found.items() and options.items() <= given.items()


@libtpu
def test_the_tpu_compiler_takes_every_program(tmp_path):
    """A small configuration through the command, with the KL pass."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2, "reduce_layer": 0}))
    options = ["--model", tmp_path, "--topology", "v5e:2x2", "--batch", "2", "--visual-tokens", "600", "--json", tmp_path / "report.json"]
    done = command_line("--what", "plus", *options, "--tensor", "2", "--beta", "0.04", "--group", "2", "--answer-tokens", "16")
    assert done.returncode == 0, done.stderr[-2000:]
    assert ": fits" in done.stdout and "compiled accumulate, 2 layers in" in done.stderr and "compiled update, 2 layers in" in done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2} and math.isclose(found["limit"], 15.75 * 2**30)
    layers = [p for p in found["programs"] if p["name"].startswith("layer, ")]
    assert layers[0]["facts"]["splash"] == 1, "the prompt before the cut is long"
