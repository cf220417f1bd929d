"""`gp-jax merge`: a plain checkpoint of base and adapter, and what it does not overwrite."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from adapter_tools import FLAT, NESTED, SAMPLES, ask, load, tensors, write
from safetensors.numpy import load_file, save_file

from gp_jax import GlimpseError, GlimpseVLM, cli
from gp_jax.models.adapter import merge
from gp_jax.tiny import make_checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base with tokenizer, processor and glimpse, and an adapter for it."""
    folder = tmp_path_factory.mktemp("merge")
    vlm = make_checkpoint(folder / "model")
    write(folder / "adapter", tensors(vlm))
    return folder


def run(*words: object) -> None:
    cli.run(["merge", *map(str, words)])


def test_a_plain_checkpoint(home, tmp_path, capsys):
    run(home / "model", "--adapter", home / "adapter", "--to", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"wrote {tmp_path / 'out'}: the adapter is merged into ") and said[0].endswith(" layers, in float32")
    assert said[1:] == ["the glimpse of the model folder is left out: a merged model needs a new one (--keep-glimpse copies it)"]
    names, before = ({path.name for path in folder.iterdir()} for folder in (tmp_path / "out", home / "model"))
    assert names == before - {"glimpse.safetensors", "new_modules_gp.pt"} | {"README.md"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl" and "reduce_layer" not in config
    for name in ("tokenizer.json", "generation_config.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (home / "model" / name).read_bytes()

    merged, tuned = GlimpseVLM.from_pretrained(tmp_path / "out"), GlimpseVLM.from_pretrained(home / "model", adapter=home / "adapter")
    assert merged.glimpse_config is None
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        block, name = part.split(".")
        ours, theirs = (getattr(getattr(model.decoder.layers[1], block), name) for model in (merged.model, merge(tuned.model)))
        np.testing.assert_array_equal(np.asarray(ours.weight[...]), np.asarray(theirs.weight[...]))
    words = dict(prune=None, max_new_tokens=6, eos_token_id=None)
    inputs = tuned.processor([[]], ["What is it?"]).inputs
    a, b = (vlm.generate(**inputs, **words) for vlm in (merged, tuned))
    np.testing.assert_allclose(a.first_logits, b.first_logits, atol=1e-4, rtol=0)


def test_biases_and_all_other_weights_stay(home, tmp_path):
    run(home / "model", "--adapter", home / "adapter", "--to", tmp_path / "out")
    before, after = load_file(home / "model" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        changed = key.endswith("_proj.weight") and ".layers." in key
        assert np.array_equal(value, after[key]) is not changed, key


def test_the_glimpse_can_be_kept(home, tmp_path, capsys):
    run(home / "model", "--adapter", home / "adapter", "--to", tmp_path / "out", "--keep-glimpse")
    assert capsys.readouterr().out.count("\n") == 1
    kept, own = (GlimpseVLM.from_pretrained(folder) for folder in (tmp_path / "out", home / "model"))
    assert kept.glimpse_config == own.glimpse_config


def test_transformers_reads_it(tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    tiny.hf_model().save_pretrained(tmp_path / "base")
    adapter = write(tmp_path / "adapter", tensors(load(tmp_path / "base")))
    run(tmp_path / "base", "--adapter", adapter, "--to", tmp_path / "out")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        logits = model(**tiny.torch_inputs(tiny.inputs(SAMPLES))).logits[:, -1].numpy()
    np.testing.assert_allclose(logits, ask(load(tmp_path / "base", adapter)), atol=1e-4, rtol=0)


def test_one_rounding_in_bfloat16(tmp_path):
    tiny.hf_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = write(tmp_path / "adapter", arrays := tensors(load(tmp_path / "base")))
    run(tmp_path / "base", "--adapter", adapter, "--to", tmp_path / "out")
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    key = f"{FLAT}2.mlp.up_proj"  # of the checkpoint
    halves = [arrays[f"base_model.model.{NESTED}2.mlp.up_proj.lora_{half}.weight"].astype(np.float64) for half in "BA"]
    exact = before[f"{key}.weight"].astype(np.float64) + 2 * halves[0] @ halves[1]
    wrong = after[f"{key}.weight"] != exact.astype(np.float32).astype(before[f"{key}.weight"].dtype)
    assert after[f"{key}.weight"].dtype == before[f"{key}.weight"].dtype and wrong.mean() < 0.01  # float64 may round ties elsewhere


def test_the_released_base(golden_folder, shared, tmp_path):
    """`config.json` loses what makes it that of a glimpse."""
    plus = shared / "goldens" / "qwen2_5_vl_gp_plus"
    if not plus.is_dir():
        pytest.skip("the goldens of GlimpsePrune+ are not here")
    run(golden_folder, "--adapter", plus, "--to", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    vlm = GlimpseVLM.from_pretrained(tmp_path / "out")
    with np.load(plus / "golden.npz") as golden:
        inputs = {name: golden[f"A.{name}"] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
        done = vlm.generate(**inputs, prune=None, max_new_tokens=12, eos_token_id=None)
        np.testing.assert_allclose(done.first_logits, golden["A.merged.unpruned.last_logits"], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(done.tokens, golden["A.merged.unpruned.generated"])
        weights = load_file(tmp_path / "out" / "model.safetensors")
        for name in golden.files:
            if name.startswith("merged.weight."):
                key = name.removeprefix("merged.weight.") + ".weight"
                np.testing.assert_allclose(weights[key], golden[name], atol=1e-6, rtol=0)


def test_what_is_not_overwritten(home, tmp_path):
    model, adapter, mine = home / "model", home / "adapter", tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(model)
    shutil.copytree(model, tmp_path / "other")
    before = sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*"))
    for to, words in (
        (model, "is what is read; name another folder"),
        (tmp_path / "link", "is what is read"),
        (adapter, "is what is read"),
        (tmp_path / "file", "exists and is not a folder"),
        (mine, "is not empty and holds no earlier merge"),
        (tmp_path / "other", "is not empty and holds no earlier merge"),
    ):
        with pytest.raises(GlimpseError, match=f"--to .*: {words}"):
            run(model, "--adapter", adapter, "--to", to)
    assert sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*")) == before
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_an_earlier_merge_is_replaced(home, tmp_path):
    (tmp_path / "out").mkdir()
    run(home / "model", "--adapter", home / "adapter", "--to", tmp_path / "out", "--keep-glimpse")
    run(home / "model", "--adapter", home / "adapter", "--to", tmp_path / "out")
    assert not (tmp_path / "out" / "glimpse.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    run(tmp_path / "out", "--adapter", home / "adapter", "--to", tmp_path / "twice")
    with pytest.raises(GlimpseError, match="is what is read"):
        run(tmp_path / "out", "--adapter", home / "adapter", "--to", tmp_path / "out")


def test_a_sum_beyond_the_type(home, tmp_path):
    model = tiny.hf_model().to(torch.float16)
    model.save_pretrained(tmp_path / "base")
    arrays = tensors(load(tmp_path / "base"))
    key = f"base_model.model.{NESTED}1.mlp.up_proj.lora_B.weight"
    write(tmp_path / "adapter", arrays | {key: arrays[key] * np.float32(1e6)})
    with pytest.raises(GlimpseError, match=r"decoder\.layers\.1\.mlp\.up_proj: base and adapter together are too large for float16"):
        run(tmp_path / "base", "--adapter", tmp_path / "adapter", "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(home, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    for words, message in (
        ([home / "model"], "--adapter is missing"),
        ([home / "model", "--adapter", home / "adapter"], "--to is missing"),
        ([tmp_path / "none", "--adapter", home / "adapter", "--to", tmp_path / "out"], "no such folder"),
        ([home / "adapter", "--adapter", home / "adapter", "--to", tmp_path / "out"], "config.json: file is missing"),
        ([home / "model", "--adapter", home / "model", "--to", tmp_path / "out"], "holds neither adapter_model.safetensors nor"),
        ([home / "model", "--adapter", tmp_path, "--to", tmp_path / "out"], "adapter_config.json: file is missing"),
    ):
        monkeypatch.setattr(sys, "argv", ["gp-jax", "merge", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert stop.value.code == 1 and captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in shown for word in ("--adapter", "--to", "--keep-glimpse", "rounded once"))
