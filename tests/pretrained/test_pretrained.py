"""Weights in and out: round trips, both key styles, shards, dtypes, and files that must be refused."""

import json
import os
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from gp_jax import GlimpseError, GlimpseVLM
from gp_jax.pretrained import files, saving
from gp_jax.pretrained.params import flat_params

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A base as transformers saves it, and a released-style glimpse."""
    folder, model = tmp_path_factory.mktemp("source"), tiny.hf_model()
    model.save_pretrained(folder / "base")
    glimpse = tiny.GLIMPSE | {"le_norm_type": "layernorm", "deep_supervision": True}
    tiny.save_glimpse(folder / "glimpse", model, glimpse, tiny.glimpse_weights(glimpse))
    return folder


def arrays(vlm: GlimpseVLM) -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in flat_params(nnx.state(vlm.model, nnx.Param)).items()}


def assert_same(a: GlimpseVLM, b: GlimpseVLM) -> None:
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def test_round_trip(source, tmp_path):
    first = GlimpseVLM.from_pretrained(source / "base", glimpse=source / "glimpse")
    first.save_pretrained(tmp_path / "saved")
    assert_same(first, GlimpseVLM.from_pretrained(tmp_path / "saved"))
    theirs, ours = load_file(source / "base" / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for key in theirs:
        np.testing.assert_array_equal(theirs[key], ours[key])


def test_saved_base_loads_in_transformers(source, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    GlimpseVLM.from_pretrained(source / "base", glimpse=source / "glimpse").save_pretrained(tmp_path / "saved")
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(source / "base")
    again, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, a), b in zip(original.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.config.text_config.rope_parameters["mrope_section"] == [1, 1, 2]


def test_saved_glimpse_is_the_released_file(source, tmp_path):
    GlimpseVLM.from_pretrained(source / "base", glimpse=source / "glimpse").save_glimpse(tmp_path / "glimpse")
    original = torch.load(source / "glimpse" / "new_modules_gp.pt", weights_only=True)
    again = torch.load(tmp_path / "glimpse" / "new_modules_gp.pt", weights_only=True)
    assert original.keys() == again.keys()
    for module, value in original.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[module])
            continue
        assert isinstance(again[module], OrderedDict) and value.keys() == again[module].keys()
        for key in value:
            assert torch.equal(value[key], again[module][key]), key
    config = json.loads((tmp_path / "glimpse" / "config.json").read_text())
    assert config["hidden_size"] == 32 and config["selected_visual_layers"] == [3, 1], "flat, as the released code reads it"
    from_torch = GlimpseVLM.from_pretrained(source / "base", glimpse=tmp_path / "glimpse")
    os.remove(tmp_path / "glimpse" / "glimpse.safetensors")
    assert_same(from_torch, GlimpseVLM.from_pretrained(source / "base", glimpse=tmp_path / "glimpse"))


@pytest.mark.parametrize("case", ["nested keys", "sharded", "tied with a copy", "old buffers"])
def test_layouts(source, tmp_path, case):
    tied = case == "tied with a copy"
    if tied:
        tiny.hf_model(tied=True).save_pretrained(tmp_path / "tied")
    origin = tmp_path / "tied" if tied else source / "base"
    expected = GlimpseVLM.from_pretrained(origin)
    tensors = load_file(origin / "model.safetensors")
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "config.json").write_bytes((origin / "config.json").read_bytes())
    if case == "nested keys":
        rename = {"model.": "model.language_model.", "visual.": "model.visual."}
        tensors = {next((new + k[len(old) :] for old, new in rename.items() if k.startswith(old)), k): v for k, v in tensors.items()}
    if case == "old buffers":
        tensors["model.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    if tied:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    files.write_shards(folder, tensors, shard_bytes=20_000 if case == "sharded" else 10**9)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (case == "sharded")
    again = GlimpseVLM.from_pretrained(folder)
    assert_same(expected, again)
    again.save_pretrained(tmp_path / "saved")
    dropped = {"model.rotary_emb.inv_freq"} | ({"lm_head.weight"} if tied else set())
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(tensors) - dropped


def test_keys_in_both_styles_are_an_error(source, tmp_path):
    def change(tensors):
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"]

    with pytest.raises(GlimpseError, match=r"1 in both key styles: model\.(language_model\.)?norm\.weight"):
        GlimpseVLM.from_pretrained(copy_with(source, tmp_path / "both", change))


def test_dtypes(source, tmp_path):
    half = GlimpseVLM.from_pretrained(source / "base", glimpse=source / "glimpse", dtype="bfloat16")
    kinds = {path: value.dtype for path, value in arrays(half).items()}
    assert kinds.pop("decoder.embed_tokens") == jnp.bfloat16
    assert all((kind == np.float32) == path.startswith(("glimpse.", "predictor.")) for path, kind in kinds.items())
    half.save_pretrained(tmp_path / "half")
    assert_same(half, GlimpseVLM.from_pretrained(tmp_path / "half"))
    assert "bfloat16" in (tmp_path / "half" / "config.json").read_text()
    for dtype in ("foo", "int8", 3):
        with pytest.raises(GlimpseError, match="is not one of float32"):
            GlimpseVLM.from_pretrained(source / "base", dtype=dtype)
    mixed = copy_with(
        source, tmp_path / "mixed", lambda t: t.update({k: v.astype(jnp.bfloat16) for k, v in t.items() if k != "lm_head.weight"})
    )
    assert GlimpseVLM.from_pretrained(mixed).model.decoder.lm_head.weight.dtype == jnp.bfloat16, "one odd tensor does not decide"


def test_stale_shards_are_removed(source, tmp_path):
    vlm = GlimpseVLM.from_pretrained(source / "base")
    (tmp_path / "out").mkdir()
    for name in ("model-00001-of-00002.safetensors", "model_ema.safetensors", "glimpse.safetensors"):
        save_file({"x": np.zeros(2)}, tmp_path / "out" / name)
    vlm.save_pretrained(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert names == {"model.safetensors", "model_ema.safetensors"}, "old shards and an old glimpse go, what is not ours stays"


def test_a_failed_save_leaves_nothing(source, tmp_path, monkeypatch):
    vlm = GlimpseVLM.from_pretrained(source / "base", glimpse=source / "glimpse")
    monkeypatch.setattr(saving, "write_glimpse", lambda model, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vlm.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def copy_with(source, folder, change):
    """The base with changed tensors. `change` edits the dict of tensors."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "base" / "config.json").read_bytes())
    tensors = load_file(source / "base" / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_one_error_lists_all_keys_that_do_not_fit(source, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.surprise"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]

    with pytest.raises(GlimpseError) as error:
        GlimpseVLM.from_pretrained(copy_with(source, tmp_path / "bad", change))
    message = str(error.value)
    assert "\n" not in message and "model.safetensors: 1 missing" in message
    assert "1 missing: model.norm.weight" in message
    assert "1 unknown: model.surprise" in message
    assert "1 mis-shaped: lm_head.weight [5, 32], expected [96, 32]" in message


def test_truncated_safetensors(source, tmp_path):
    folder = copy_with(source, tmp_path / "cut", lambda tensors: None)
    data = (folder / "model.safetensors").read_bytes()
    for size in (5, 2000, len(data) - 100):
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(GlimpseError, match=r"model.safetensors: is not a readable safetensors file"):
            GlimpseVLM.from_pretrained(folder)


def test_missing_pieces(source, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(GlimpseError, match=r"config.json: file is missing"):
        GlimpseVLM.from_pretrained(empty)
    (empty / "config.json").write_bytes((source / "base" / "config.json").read_bytes())
    with pytest.raises(GlimpseError, match="holds neither model.safetensors nor"):
        GlimpseVLM.from_pretrained(empty)
    (empty / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(GlimpseError, match="names shards that are missing: .*gone.safetensors"):
        GlimpseVLM.from_pretrained(empty)
    with pytest.raises(GlimpseError, match="no such folder"):
        GlimpseVLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(GlimpseError, match="Hugging Face Hub did not give it"):
        GlimpseVLM.from_pretrained("nobody/no-such-model")
    with pytest.raises(GlimpseError, match="holds neither glimpse.safetensors nor new_modules_gp.pt"):
        GlimpseVLM.from_pretrained(source / "base", glimpse=source / "base")


def test_glimpse_of_another_model(source, tmp_path):
    model = tiny.hf_model()
    tiny.save_glimpse(tmp_path / "wide", model, tiny.GLIMPSE, tiny.glimpse_weights(tiny.GLIMPSE, text_size=40))
    with pytest.raises(
        GlimpseError, match=r"weights do not fit the config: .*new_modules_gp.pt: 4 mis-shaped: .*learnable_embeddings \[3, 1, 40\]"
    ):
        GlimpseVLM.from_pretrained(source / "base", glimpse=tmp_path / "wide")


def test_v2_may_carry_unused_condition_projections(source, tmp_path):
    """The released V2 inherits them; files with and without them load, and the saved file has them for a strict load there."""
    glimpse = tiny.GLIMPSE | {"attn_fuse_type": "AttnFuserV2"}
    weights = tiny.glimpse_weights(glimpse)
    tiny.save_glimpse(tmp_path / "without", tiny.hf_model(), glimpse, weights)
    v1 = tiny.glimpse_weights(tiny.GLIMPSE)["attn_fuser"]
    weights["attn_fuser"] |= {k: v for k, v in v1.items() if k.startswith("cond_in_projs")}
    tiny.save_glimpse(tmp_path / "with", tiny.hf_model(), glimpse, weights)
    GlimpseVLM.from_pretrained(source / "base", glimpse=tmp_path / "without")
    carried = GlimpseVLM.from_pretrained(source / "base", glimpse=tmp_path / "with")
    carried.save_glimpse(tmp_path / "saved")
    saved = torch.load(tmp_path / "saved" / "new_modules_gp.pt", weights_only=True)["attn_fuser"]
    assert torch.equal(saved["cond_in_projs.1.weight"], v1["cond_in_projs.1.weight"])


def test_weights_must_be_floating(tmp_path, source):
    weights = tiny.glimpse_weights(tiny.GLIMPSE)
    weights["le_proj"]["bias"] = weights["le_proj"]["bias"].long()
    tiny.save_glimpse(tmp_path / "whole", tiny.hf_model(), tiny.GLIMPSE, weights)
    with pytest.raises(GlimpseError, match=r"le_proj.bias has dtype int64"):
        GlimpseVLM.from_pretrained(source / "base", glimpse=tmp_path / "whole")
