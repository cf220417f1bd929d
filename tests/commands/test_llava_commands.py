"""Everything for free: ask, train.py, export, eval.py and compiling ahead on LLaVA, as on any other model."""

import contextlib
import json

import jax
import numpy as np
import pytest
import tiny_llava as llava

from gp_jax import GlimpseVLM, tiny
from gp_jax.commands import ask
from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.training.settings import GlimpseSettings, OptimConfig, TrainConfig


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model in the layout of LLaVA's own code, and data."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "model"
    folder.mkdir()
    llava.save_original(folder, llava.hf_model())
    tiny.make_dataset(home / "data", count=12)
    return home


def test_train_export_ask_and_eval(home, tmp_path, capsys):
    from gp_jax.evaluation.command import main as evaluate
    from gp_jax.training.loop import train

    config = TrainConfig(
        model=str(home / "model"),
        out=str(tmp_path / "run"),
        data=DataConfig(
            sources=(DataSource(str(home / "data")),), validation=(DataSource(str(home / "data"), split="val"),), shapes=1, threads=1
        ),
        glimpse=GlimpseSettings(attn_fuse_size=16, visual_cond_size=16, attn_fuse_num_heads=2),
        optim=OptimConfig(learning_rate=1e-3),
        batch_size=8,
        accumulation=1,
        steps=2,
        validate_every=2,
        validation_pictures=1,
        log_every=1,
    ).check()
    train(config)
    assert list((tmp_path / "run" / "validation").rglob("*.png"))
    export = tmp_path / "run" / "export"
    glimpse = GlimpseVLM.from_pretrained(home / "model", glimpse=export).glimpse_config
    assert glimpse.selected_visual_layers == (3, 2, 1) and not glimpse.use_attention_logits

    picture = tmp_path / "photo.png"
    llava.photo(90, 60).save(picture)
    argv = [str(picture), "What is it?", "--model", str(home / "model"), "--glimpse", str(export), "--max-new-tokens", "3"]
    capsys.readouterr()
    ask.run(ask.parse([*argv, "--fixed-remain-ratio", "0.25", "--overlay", str(tmp_path / "kept.png"), "--json"]))
    said = json.loads(capsys.readouterr().out)
    assert said["kept_tokens"] == 4 and said["total_tokens"] == 16 and (tmp_path / "kept.png").exists()

    report = tmp_path / "report"
    options = ["--model", str(home / "model"), "--glimpse", str(export), "--out", str(report), "--tasks", f"{home / 'data'}:val"]
    assert evaluate([*options, "--plans", "dense", "glimpse-11.1", "oracle", "--limit", "2", "--batch", "2"]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (report / "predictions.jsonl").read_text().splitlines()]
    assert {line["plan"] for line in lines} == {"dense", "glimpse-11.1", "oracle"} and all(line["total"] == 16 for line in lines)


def test_compiling_ahead(home, monkeypatch):
    from gp_jax.ahead import training as ahead_training
    from gp_jax.commands.compile import model_named

    monkeypatch.setattr(ahead_training, "topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(ahead_training, "targeting", lambda backend: contextlib.nullcontext())
    config, _ = model_named(str(home / "model"))
    fit = ahead_training.compile_training(config, "v5e:2x4", batch=4, visual_tokens=16, fsdp=4, tensor=2, dtype="float32")
    assert fit.chips == 8 and fit.fits and fit.shape.slots == 16
    assert model_named("llava-1.5-7b")[0].text.num_hidden_layers == 32 and model_named("llava-1.5-13b")[0].vision.out_hidden_size == 5120


def test_sizes_have_the_published_parameters():
    import math

    import jax.numpy as jnp
    from flax import nnx

    from gp_jax.pretrained.known import SIZES
    from gp_jax.pretrained.params import abstract_model

    model = abstract_model(SIZES["llava-1.5-7b"], None, jnp.bfloat16)
    count = sum(math.prod(np.shape(x)) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == 6738415616 + 303507456 + (1024 * 4096 + 4096) + (4096 * 4096 + 4096)  # Vicuna, CLIP's vision tower, projector
