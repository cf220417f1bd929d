"""Which of a folder's weights are meant, by the rules of transformers: single files, shards, tied and untied heads, two glimpses."""

import errno
import json
import os
import warnings

import numpy as np
import pytest
import tiny_llava
import tiny_models as tiny
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from gp_jax import GlimpseError, GlimpseVLM
from gp_jax.pretrained import files, params, saving
from gp_jax.pretrained.params import flat_params

pytestmark = pytest.mark.quick

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tied base as transformers saves it, and a glimpse."""
    folder, model = tmp_path_factory.mktemp("source"), tiny.hf_model(tied=True)
    model.save_pretrained(folder / "base")
    tiny.save_glimpse(folder / "glimpse", model, tiny.GLIMPSE, tiny.glimpse_weights(tiny.GLIMPSE))
    return folder


def weights(vlm: GlimpseVLM) -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in flat_params(nnx.state(vlm.model, nnx.Param)).items()}


def copy(source, folder, tensors=None, config=None, **options):
    """The base with other tensors or settings; options: of `write_shards`."""
    folder.mkdir()
    said = json.loads((source / "base" / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(said))
    files.write_shards(folder, load_file(source / "base" / "model.safetensors") | (tensors or {}), **options)
    return folder


def other_head(source) -> np.ndarray:
    return np.roll(load_file(source / "base" / "model.safetensors")[EMBEDDING], 7, axis=0)


def flags(source, outer: bool | None, inner: bool | None) -> dict:
    """Settings that say so at the top and inside."""
    said = json.loads((source / "base" / "config.json").read_text())
    text = said["text_config"] | {"tie_word_embeddings": inner}
    return {"tie_word_embeddings": outer, "text_config": {name: value for name, value in text.items() if value is not None}}


@pytest.mark.parametrize("outer, inner", [(True, None), (None, True), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shards", [10**9, 20_000], ids=["single", "sharded"])
def test_a_head_of_its_own_is_kept_and_said(source, tmp_path, outer, inner, shards, monkeypatch):
    monkeypatch.setattr(params, "BLOCK", 64)  # two rows at a time
    head = other_head(source)
    folder = copy(source, tmp_path / "own", {HEAD: head}, flags(source, outer, inner), shard_bytes=shards)
    with pytest.warns(UserWarning, match=r"tie_word_embeddings, but lm_head\.weight differs from .*embed_tokens\.weight") as said:
        vlm = GlimpseVLM.from_pretrained(folder)
    assert len(said) == 1
    np.testing.assert_array_equal(weights(vlm)["decoder.lm_head.weight"], head)
    assert not vlm.config.text.tie_word_embeddings
    vlm.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["tie_word_embeddings"] is False and saved["text_config"]["tie_word_embeddings"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = weights(GlimpseVLM.from_pretrained(tmp_path / "saved"))
    np.testing.assert_array_equal(again["decoder.lm_head.weight"], head)


def test_transformers_reads_the_saved_head(source, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = copy(source, tmp_path / "own", {HEAD: other_head(source)})
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).lm_head.weight.detach().numpy()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        vlm = GlimpseVLM.from_pretrained(folder, glimpse=source / "glimpse")
    np.testing.assert_array_equal(weights(vlm)["decoder.lm_head.weight"], theirs)
    vlm.save_pretrained(tmp_path / "saved")  # flat, since there is a glimpse
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.lm_head.weight.detach().numpy(), theirs)


@pytest.mark.parametrize("case", ["equal", "no head", "head alone"])
def test_tied(source, tmp_path, case):
    """Both and equal, or one of the two, whichever."""
    tensors = load_file(source / "base" / "model.safetensors")
    key = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    tensors |= {"lm_head.weight": tensors[key]} if case != "no head" else {}
    expected = tensors[key]
    if case == "head alone":
        del tensors[key]
    folder = copy(source, tmp_path / "tied")
    save_file(tensors, folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = weights(GlimpseVLM.from_pretrained(folder))
    assert "decoder.lm_head.weight" not in found
    np.testing.assert_array_equal(found["decoder.embed_tokens"], expected)


def test_untied_without_a_head_is_refused(source, tmp_path):
    """transformers begins with a random one."""
    with pytest.raises(GlimpseError, match=r"1 missing: lm_head\.weight"):
        GlimpseVLM.from_pretrained(copy(source, tmp_path / "bare", config=flags(source, False, False)))


def test_a_head_of_another_shape_is_refused(source, tmp_path):
    with pytest.warns(UserWarning), pytest.raises(GlimpseError, match=r"1 mis-shaped: lm_head\.weight \[5, 32\]"):
        GlimpseVLM.from_pretrained(copy(source, tmp_path / "short", {HEAD: other_head(source)[:5]}))


@pytest.mark.parametrize("following", [False, True], ids=["llava", "llava_next"])
def test_heads_of_llava(tmp_path, following):
    folder = tiny_llava.save_hf(tmp_path / "hf", tiny_llava.hf_model(following=following))
    config = json.loads((folder / "config.json").read_text())
    head = next(value for key, value in load_file(folder / "model.safetensors").items() if key.endswith("lm_head.weight"))
    for outer, inner in ((True, False), (False, True)):
        config["text_config"]["tie_word_embeddings"], config["tie_word_embeddings"] = inner, outer
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            vlm = GlimpseVLM.from_pretrained(folder)
        np.testing.assert_array_equal(weights(vlm)["decoder.lm_head.weight"], head)


def test_a_single_file_is_read_before_an_index(source, tmp_path):
    """Old shards beside it, an index whose shards are gone, files of torch: what transformers reads is what is read."""
    folder = copy(source, tmp_path / "both", shard_bytes=20_000)
    new = load_file(source / "base" / "model.safetensors")
    new = {key: value + 1 for key, value in new.items()}
    old = weights(GlimpseVLM.from_pretrained(folder))
    save_file(new, folder / "model.safetensors")
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    for _ in range(2):
        found = weights(GlimpseVLM.from_pretrained(folder))
        for key in old:
            np.testing.assert_array_equal(found[key].ravel(), old[key].ravel() + 1)
        for path in folder.glob("model-*.safetensors"):
            path.unlink()  # the index stays


def test_files_of_torch_likewise(source, tmp_path):
    folder = copy(source, tmp_path / "bin")
    tensors = {key: torch.from_numpy(value) for key, value in load_file(folder / "model.safetensors").items()}
    os.remove(folder / "model.safetensors")
    torch.save({key: value + 1 for key, value in tensors.items()}, folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}))
    sharded = weights(GlimpseVLM.from_pretrained(folder))
    torch.save(tensors, folder / "pytorch_model.bin")
    single = weights(GlimpseVLM.from_pretrained(folder))
    for key in single:
        np.testing.assert_array_equal(single[key] + 1, sharded[key])


def test_indices_that_do_not_work(source, tmp_path):
    folder = copy(source, tmp_path / "shards", shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for names in ({}, [], {"a": 3}, {"a": "../x"}, {"a": "b/c"}, {"a": "/etc/passwd"}, "text"):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(GlimpseError, match="'weight_map' must name a file"):
            GlimpseVLM.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"a": ".."}}))
    with pytest.raises(GlimpseError, match="is a folder"):
        GlimpseVLM.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {f"k{i}": f"model-{i}.safetensors" for i in range(500)}}))
    with pytest.raises(GlimpseError, match="shards that are missing: .* and 496 more") as error:
        GlimpseVLM.from_pretrained(folder)
    assert len(str(error.value)) < 700
    first, *_, last = sorted(set(good.values()))
    index.write_text(json.dumps({"weight_map": good}))
    double = load_file(folder / first)
    save_file(load_file(folder / last) | {next(iter(double)): next(iter(double.values()))}, folder / last)
    with pytest.raises(GlimpseError, match="1 tensors that another shard holds too"):
        GlimpseVLM.from_pretrained(folder)


def test_an_adapter_that_is_not_merged(source, tmp_path):
    folder = copy(source, tmp_path / "lora")
    (folder / "adapter_config.json").write_text("{}")
    GlimpseVLM.from_pretrained(folder)
    save_file({"x": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(GlimpseError, match="LoRA adapter .* not merged"):
        GlimpseVLM.from_pretrained(folder)


def test_two_glimpses_in_one_folder(source, tmp_path):
    """Ours is read; one that somebody put beside it is said."""
    vlm = GlimpseVLM.from_pretrained(source / "base", glimpse=source / "glimpse")
    vlm.save_glimpse(tmp_path / "glimpse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GlimpseVLM.from_pretrained(source / "base", glimpse=tmp_path / "glimpse")
    torch.save(tiny.glimpse_weights(tiny.GLIMPSE, seed=5), tmp_path / "glimpse" / "new_modules_gp.pt")
    with pytest.warns(UserWarning, match=r"glimpse\.safetensors is used; new_modules_gp\.pt beside it holds another"):
        again = GlimpseVLM.from_pretrained(source / "base", glimpse=tmp_path / "glimpse")
    np.testing.assert_array_equal(weights(again)["predictor.attn_in_proj.weight"], weights(vlm)["predictor.attn_in_proj.weight"])


def test_a_file_that_the_config_names(source, tmp_path):
    """`transformers_weights`, which a saved folder no longer has."""
    folder = copy(source, tmp_path / "chosen", config={"transformers_weights": "other.safetensors"})
    save_file({key: value + 1 for key, value in load_file(folder / "model.safetensors").items()}, folder / "other.safetensors")
    vlm = GlimpseVLM.from_pretrained(folder)
    usual = weights(GlimpseVLM.from_pretrained(source / "base"))
    for key, value in weights(vlm).items():
        np.testing.assert_array_equal(value, usual[key] + 1)
    vlm.save_pretrained(tmp_path / "saved")
    again = weights(GlimpseVLM.from_pretrained(tmp_path / "saved"))
    np.testing.assert_array_equal(again["decoder.norm.weight"], weights(vlm)["decoder.norm.weight"])
    for number, name in enumerate(("../x.safetensors", "/etc/passwd", 3, "x.bin", ["a"])):
        with pytest.raises(GlimpseError, match=r"config\.json: transformers_weights=.* must name a safetensors file"):
            GlimpseVLM.from_pretrained(copy(source, tmp_path / str(number), config={"transformers_weights": name}))


def test_a_disk_without_room(source, tmp_path, monkeypatch):
    """One line that names the file, and nothing is left behind."""
    vlm = GlimpseVLM.from_pretrained(source / "base", glimpse=source / "glimpse")
    with pytest.raises(GlimpseError, match=r"no[\/]x\.safetensors: cannot be written"):
        files.write_tensors(tmp_path / "no" / "x.safetensors", {"x": np.zeros(1)})

    def full(model, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "x"))

    monkeypatch.setattr(saving, "write_glimpse", full)
    for save in (vlm.save_pretrained, vlm.save_glimpse):
        with pytest.raises(GlimpseError, match="cannot be written .No space left"):
            save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
