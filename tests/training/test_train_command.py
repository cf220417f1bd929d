"""Configurations of `train.py`: files, overrides, errors of one line; the shipped ones; compiling for a machine that is not here."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gp_jax import GlimpseError, cli
from gp_jax.config import choices
from gp_jax.config.model import GlimpseConfig
from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.ops.attention import KERNELS
from gp_jax.pretrained.known import SIZES
from gp_jax.scenes.settings import Canvas, ScenesConfig
from gp_jax.sharding import mesh_sizes
from gp_jax.training.base_settings import BaseConfig
from gp_jax.training.build import glimpse_config, plain
from gp_jax.training.command import main, parse
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.places import find_places
from gp_jax.training.settings import GlimpseSettings, OptimConfig, TrainConfig

pytestmark = pytest.mark.quick

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = TrainConfig(model="m", data=DataConfig(sources=(DataSource("d"),)))
BASE = BaseConfig(model="m", scenes=ScenesConfig(canvases=(Canvas(64, 64, 1, 1.0, 1.0),)))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text("from gp_jax.training.settings import *\n" + text)
    return path


@pytest.fixture
def mine(tmp_path):
    return write(
        tmp_path, "train = TrainConfig(model='m', data=DataConfig(sources=(DataSource('d'),)), optim=OptimConfig(learning_rate=0.5))"
    )


@pytest.mark.parametrize("size, depth, cut", [("3b", 36, 23), ("7b", 28, 18)])
@pytest.mark.parametrize("kind", ["gqa", "own_data"])
def test_shipped_configurations(size, depth, cut, kind):
    path = CONFIGS / f"qwen2_5_vl_{size}_{kind}.py"
    config = parse(["--config", str(path)]).train().check()
    assert path.read_text().startswith(f'"""gp-jax train --config {path.stem}')
    assert config.model == f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct" and config.dtype == "bfloat16"
    released = GlimpseConfig(
        selected_layers=(cut,),
        reduce_layer=cut,
        le_layers=tuple(range(depth)),
        le_dropout_prob=0.1,
        use_attention_logits=True,
        attn_fuse_size=256,
        attn_fuse_global=True,
        selected_visual_layers=(31, 23, 15, 7),
        visual_cond_size=512,
        ori_attn_supervision=False,
        deep_supervision=False,
    )
    assert glimpse_config(config.glimpse, SIZES[size]) == released
    assert glimpse_config(GlimpseSettings(), SIZES[size]) == released, "the defaults are the released settings"
    if kind == "gqa":
        assert config.data.sources[0].sampling == "random:20000" and config.batch_size * config.accumulation == 8 and config.epochs == 1
        assert config.optim == OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_ratio=0.1, clip_norm=1.0)


@pytest.mark.parametrize("size, depth, cut", [("2b", 28, 18), ("4b", 36, 23), ("8b", 36, 23)])
@pytest.mark.parametrize("kind", ["gqa", "own_data", "plus"])
def test_shipped_configurations_of_qwen3_vl(size, depth, cut, kind):
    path = CONFIGS / f"qwen3_vl_{size}_{kind}.py"
    config = parse(["--config", str(path)]).train().check()
    assert path.read_text().startswith(f'"""gp-jax train --config {path.stem}')
    assert config.model == f"Qwen/Qwen3-VL-{size.upper()}-Instruct" and config.dtype == "bfloat16"
    assert config.data.max_visual_tokens == 2048, "a photograph can have 16,384"
    if kind == "plus":
        assert config.masks.after == cut
        return
    glimpse = glimpse_config(config.glimpse, SIZES[f"qwen3-vl-{size}"])
    assert (glimpse.reduce_layer, glimpse.selected_layers, glimpse.le_layers) == (cut, (cut,), tuple(range(depth)))
    assert glimpse.selected_visual_layers == ((26, 24, 16, 8) if size == "8b" else (23, 17, 11, 5))
    assert glimpse == glimpse_config(GlimpseSettings(), SIZES[f"qwen3-vl-{size}"]), "what a new glimpse of this model gets by itself"


def test_a_copy_of_a_configuration_that_imports_another_works_in_any_folder(tmp_path):
    shutil.copy(CONFIGS / "llava_1_5_13b_gqa.py", tmp_path / "mine.py")
    (tmp_path / "configs").mkdir()  # not those that are meant
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, CONFIGS.parent / "train.py", "--config", "mine.py", "--print-config"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shown, first = json.loads(ran.stdout), parse(["--config", str(CONFIGS / "qwen2_5_vl_7b_gqa.py")]).train()
    assert shown["model"] == "liuhaotian/llava-v1.5-13b" and shown["glimpse"]["reduce_layer"] == 26
    for name in ("data", "loss", "optim", "accumulation", "save_every"):
        assert shown[name] == plain(getattr(first, name)), f"{name} is that of the configuration that the others are derived from"


def test_the_command_line_changes_the_file(mine, capsys):
    launch = parse(["--config", str(mine), "--optim.b1", "0.8", "--data.sources.0.sampling", "first:3", "--steps", "7"])
    config = launch.train()
    assert type(config) is TrainConfig
    assert config.optim.learning_rate == 0.5 and config.optim.b1 == 0.8 and config.steps == 7
    assert config.data.sources[0].sampling == "first:3"
    assert main(["--config", str(mine), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["optim"]["learning_rate"] == 0.5


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--optim.learning-rte", "1"], "--optim.learning-rate"),
        (["--optim.learning-rate", "fast"], "fast"),
        (["--bach-size", "1"], "--batch-size"),
    ],
)
def test_misspelt_options_are_corrected(mine, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parse(["--config", str(mine), *argv])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err + shown.out


@pytest.mark.parametrize(
    "text, message",
    [
        ("train = TrainConfig(modl='m')", "unexpected keyword argument 'modl'; did you mean 'model'?"),
        ("train = TrainConfig(optim=OptimConfig(lerning_rate=1))", "did you mean 'learning_rate'?"),
        ("train = 5", "needs `train = TrainConfig"),
        ("1 / 0", "ZeroDivisionError"),
        ("train = TrainConfig(", "SyntaxError"),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path, capsys, text, message):
    path = write(tmp_path, text)
    assert main(["--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: --config {path}") and message in error and error.count("\n") == 1


def test_a_missing_file_names_its_neighbour(mine, capsys):
    assert main(["--config", str(mine.with_name("mien.py"))]) == 1
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model=""), "model is missing"),
        (dict(data=DataConfig()), "data.sources is empty"),
        (dict(batch_size=0), "batch_size=0 must be positive"),
        (dict(steps=-1), "steps=-1 must be positive"),
        (dict(dtype="int8"), "dtype='int8'"),
        (
            dict(optim=OptimConfig(schedule="cosin")),
            "optim.schedule='cosin' is not one of cosine, linear, constant, did you mean 'cosine'?",
        ),
        (dict(optim=OptimConfig(name="AdamW")), "optim.name='AdamW' is not one of adamw, muon, did you mean 'adamw'?"),
        (dict(attention="flash"), "attention='flash' is not one of auto, einsum, "),
        (dict(glimpse=GlimpseSettings(le_norm_type="rms")), "glimpse.le_norm_type='rms' is not one of rmsnorm, layernorm"),
        (dict(glimpse=GlimpseSettings(attn_fuse_type="AttnFuser")), "did you mean 'AttnFuserV2'?"),
        (dict(batch_size="8"), "batch_size='8' is not a number"),
        (dict(optim=OptimConfig(learning_rate=float("nan"))), "optim.learning_rate=nan is not a number"),
        (dict(optim=OptimConfig(warmup_ratio=2.0)), "optim.warmup_ratio=2.0 is not in 0..1"),
        (dict(data=DataConfig(sources=(DataSource("d", sampling="some"),))), "sampling='some'"),
        (dict(data=DataConfig(sources=(DataSource("d", weight=1.0), DataSource("e")))), "give every source a weight, or none"),
        (
            dict(data=DataConfig(sources=GOOD.data.sources, validation=(DataSource("d"), DataSource("e", weight=1.0)))),
            "data.validation: give every source a weight, or none",
        ),
        (dict(data=DataConfig(sources=(DataSource("d", weight=-1.0),))), "weight=-1.0 must be positive"),
    ],
)
def test_bad_values_name_their_field(changes, message):
    with pytest.raises(GlimpseError, match=re.escape(message)):
        dataclasses.replace(GOOD, **changes).check()


def test_words_that_are_known_before_anything_is_loaded_are_those_that_work():
    assert {"auto", *KERNELS} == set(choices.ATTENTION)
    for name in choices.OPTIMIZERS:
        assert optimizer(OptimConfig(name=name), 10)
    for schedule in choices.SCHEDULES:
        assert learning_rate(OptimConfig(schedule=schedule), 10)
    with pytest.raises(GlimpseError, match=r"optim\.name='muan' is not one of adamw, muon, did you mean 'muon'\?"):
        dataclasses.replace(BASE, optim=OptimConfig(name="muan")).check()


def test_own_data_is_a_shorthand(tmp_path):
    config = dataclasses.replace(GOOD, data=DataConfig(sources=(DataSource("", suffix="Briefly."),), own=str(tmp_path))).check()
    assert config.data.sources == (DataSource(str(tmp_path), suffix="Briefly."),) and config.check() == config
    assert find_places(config).data.validation == ()
    (tmp_path / "index-val.jsonl").touch()
    validation = find_places(config).data.validation
    assert [(source.split, source.suffix) for source in validation] == [("val", "Briefly.")], "asked as in training"
    chosen = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=(DataSource("other"),)))
    assert find_places(chosen) == chosen


def test_a_bucket_is_not_needed_to_print_a_configuration(mine, monkeypatch, capsys):
    def offline(*_: object):
        raise AssertionError("the network")

    monkeypatch.setattr("etils.epath.backend._FileSystemSpecBackend.fs", offline)
    monkeypatch.setattr("gp_jax.training.places.importlib.util.find_spec", lambda name: None)
    argv = ["--config", str(mine), "--data.own", "gs://bucket/data", "--out", "gs://bucket/run"]
    assert main([*argv, "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["sources"][0]["path"] == "gs://bucket/data"
    with pytest.raises(GlimpseError, match=r'^data\.sources\[0\]\.path=gs://bucket/data: .* pip install "gp_jax\[gcs\]"$'):
        find_places(parse(argv).train().check())


def test_learning_rate_is_that_of_transformers():
    """Warm-up and cosine against transformers' own scheduler, and AdamW with clipping against torch."""
    import numpy as np
    import torch
    from transformers import get_cosine_schedule_with_warmup

    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    adamw = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
    theirs = get_cosine_schedule_with_warmup(adamw, 2, 20)
    config = OptimConfig(learning_rate=1e-2)
    ours, schedule = optimizer(config, 20), learning_rate(config, 20)
    params = np.array([1.0, -2.0], np.float32)
    state = ours.init(params)
    for step in range(20):
        assert float(schedule(step)) == pytest.approx(adamw.param_groups[0]["lr"], abs=1e-8)
        gradient = np.array([3.0, 0.1 * step], np.float32)
        weight.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        adamw.step()
        theirs.step()
        updates, state = ours.update(gradient, state, params)
        params = params + np.asarray(updates)
    np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-5)
    with pytest.raises(GlimpseError, match="optim.schedule='step'"):
        learning_rate(OptimConfig(schedule="step"), 10)


def test_mesh_sizes():
    assert mesh_sizes(1, -1, 1, 8) == (1, 8, 1) and mesh_sizes(2, -1, 2, 8) == (2, 2, 2) and mesh_sizes(-1, 1, 1, 1) == (1, 1, 1)
    for sizes in ((-1, -1, 1), (0, 1, 1), (1, -2, 1), (3, -1, 1)):
        with pytest.raises(GlimpseError, match="mesh data="):
            mesh_sizes(*sizes, 8)


def fail(capsys, monkeypatch, *argv: str) -> str:
    monkeypatch.setattr("sys.argv", ["gp-jax", *argv])
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--model is missing"),
        (["--what", "train"], "--model is missing"),
        (["--what", "train", "--model", "9b"], "--model 9b: is not 3b, 7b, "),
        (["--what", "train", "--model", "7b", "--batch", "0"], "--batch 0 must be positive"),
        (
            ["--what", "train", "--model", "7b", "--topology", "v0:9x9"],
            "--topology v0:9x9: is not GENERATION:CHIPS of a known TPU (v4:",
        ),
        (["--model", "7b", "--retention", "2"], "--retention 2.0 is not in 0..1"),
        (["--model", "7b", "--mesh", "data=2", "--tensor", "2"], "--mesh cannot be combined with --data, --fsdp or --tensor"),
        (["--model", "7b", "--mesh", "rows=2"], "--mesh rows=2: is not like data=2,fsdp=1,tensor=4"),
        (["--model", "7b", "--json", "/none/x.json"], "--json /none/x.json: folder /none does not exist"),
    ],
)
def test_compile_errors_are_one_line(capsys, monkeypatch, argv, message):
    monkeypatch.setattr("gp_jax.commands.compile.WITHOUT_TPU", {})
    assert message in fail(capsys, monkeypatch, "compile", *argv)


def test_compiling_ahead_says_what_a_chip_needs(monkeypatch):
    """With a mesh of fake devices in the place of a topology: shapes without arrays through the real step."""
    from gp_jax.ahead import training as ahead_training
    from gp_jax.pretrained.hf_config import model_config
    from gp_jax.sharding import make_mesh
    from gp_jax.tiny import CONFIG

    monkeypatch.setattr(ahead_training, "topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(ahead_training, "targeting", lambda backend: jax.set_mesh(make_mesh(1, 4, 2)))
    fit = ahead_training.compile_training(model_config(CONFIG, {}), "v5e:2x4", batch=4, visual_tokens=100, dtype="float32", tensor=2)
    assert fit.chips == 8 and fit.fits and fit.shape.slots >= 100 and fit.shape.prompt >= 164 and fit.shape.tail == 48
    assert fit.total >= fit.arguments + fit.temporary > 0
    assert "HBM per chip" in ahead_training.report(fit) and ": fits" in ahead_training.report(fit)
    with pytest.raises(GlimpseError, match="--batch 3 is not a multiple of data x fsdp = 4"):
        ahead_training.compile_training(model_config(CONFIG, {}), "v5e:2x4", batch=3, visual_tokens=100, tensor=2)
