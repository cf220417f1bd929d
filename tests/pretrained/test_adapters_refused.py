"""LoRA adapters that are refused, each in one line that names file, field or tensors."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
from adapter_tools import FLAT, NESTED, ask, load, tensors, write

from gp_jax import GlimpseError, GlimpseVLM
from gp_jax.models.adapter import adapted

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny.hf_model().save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def plain(base) -> GlimpseVLM:
    return load(base)


@pytest.fixture
def good(plain, tmp_path) -> Path:
    return write(tmp_path / "adapter", tensors(plain))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"peft_type": None}, "field 'peft_type' is missing"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not supported"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern=.* is not supported"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora="),
        ({"use_new_thing": True}, "use_new_thing=True is not supported"),
        ({"megatron_config": {"x": 1}}, "megatron_config="),
        ({"target_parameters": ["x"]}, "target_parameters="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported: it changes the base's weights"),
        ({"layers_pattern": "blocks", "target_modules": ["q_proj"]}, "layers_pattern='blocks' is not layers"),
        ({"layers_to_transform": "x", "target_modules": ["q_proj"]}, "layers_to_transform='x' must be a number"),
        ({"layers_to_transform": [0, 1], "target_modules": ["q_proj"]}, "holds 19 layers that target_modules does not name"),
        ({"exclude_modules": ["q_proj"]}, r"holds 3 layers that target_modules does not name \(adapter_config.json\): model"),
        ({"target_modules": ["q_proj", "gate_proj"]}, "holds 15 layers that target_modules does not name"),
        ({"target_modules": None}, "field 'target_modules' is missing"),
        ({"target_modules": []}, "field 'target_modules' is missing"),
        ({"target_modules": [1]}, "must be a list of names or one regular expression"),
        ({"target_modules": "("}, r"target_modules: '\(' is not a regular expression"),
        ({"target_modules": r"(\w+\.?)*!"}, "target_modules: the regular expression .* takes too much time or memory"),
        ({"target_modules": "(" * 9999 + ")" * 9999}, r"target_modules: '\(.*\)' is not a regular expression"),
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True"),
        ({"r": 8}, r"lora_A.weight has the shape \[4, \d+\], with r=8 it must be \[8, \d+\]"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": "8"}, "lora_alpha='8'"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)  # fmt: skip
def test_settings_that_are_refused(base, plain, tmp_path, changes, words):
    with pytest.raises(GlimpseError, match=words) as error:
        load(base, write(tmp_path / "a", tensors(plain), **changes))
    assert str(error.value).startswith(str(tmp_path / "a" / "adapter_"))


def test_settings_that_do_not_matter(base, plain, good, tmp_path):
    fields = {"corda_config": None, "megatron_core": "megatron.core", "peft_version": "9.9", "revision": "x", "layers_to_transform": None}
    fields |= {"init_lora_weights": "gaussian", "loftq_config": {}, "new_field": 5, "use_dora": False, "lora_alpha": 8.0, "bias": None}
    np.testing.assert_array_equal(ask(load(base, write(tmp_path / "a", tensors(plain), **fields))), ask(load(base, good)))


FIRST = f"base_model.model.{NESTED}0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight": (4, 24)}, "1 tensors that are not .*visual.blocks.0.attn.qkv"),
        ({"base_model.model.lm_head.lora_A.weight": (4, 32)}, "lm_head.lora_A"),
        ({"base_model.model.model.language_model.embed_tokens.weight": (96, 32)}, "embed_tokens.weight"),
        ({"base_model.model.model.language_model.embed_tokens.lora_embedding_A": (4, 96)}, "lora_embedding_A"),
        ({f"{FIRST}.lora_magnitude_vector": (32,)}, "lora_magnitude_vector"),
        ({f"{FIRST}.lora_B.bias": (32,)}, "lora_B.bias"),
        ({f"base_model.model.{NESTED}3.self_attn.q_proj.lora_A.weight": (4, 32)}, r"decoder \(3 layers\): base_model.*layers.3"),
        ({f"base_model.model.{FLAT}0.self_attn.q_proj.lora_A.weight": (4, 32)}, "1 tensors are there by two names"),
        ({f"{FIRST}.lora_A.weight": None}, "1 tensors lack their other half: .*q_proj.lora_B"),
        ({f"{FIRST}.lora_A.weight": None, f"{FIRST}.lora_B.weight": None}, "lacks 1 layers of target_modules .*layers.0.self_attn.q_proj"),
        ({f"{FIRST}.lora_B.weight": (4, 32)}, r"q_proj.lora_B.weight has the shape \[4, 32\], with r=4 it must be \[32, 4\]"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(base, plain, tmp_path, change, words):
    arrays = tensors(plain)
    for key, shape in change.items():
        arrays.pop(key, None)
        if shape is not None:
            arrays[key] = np.zeros(shape, np.float32)
    with pytest.raises(GlimpseError, match=words) as error:
        load(base, write(tmp_path / "a", arrays))
    assert str(error.value).startswith(str(tmp_path / "a" / "adapter_model.safetensors"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300], ids=str)
def test_values_that_are_not_finite(base, plain, tmp_path, value):
    arrays = tensors(plain)
    arrays[f"{FIRST}.lora_B.weight"] = np.full((32, 4), value, np.float64)
    with pytest.raises(GlimpseError, match="q_proj.lora_B.weight holds values that are not finite"):
        load(base, write(tmp_path / "a", arrays))


def test_whole_numbers_and_empty_files(base, plain, tmp_path):
    arrays = tensors(plain) | {f"{FIRST}.lora_B.weight": np.zeros((32, 4), np.int8)}
    with pytest.raises(GlimpseError, match="has dtype I8"):
        load(base, write(tmp_path / "a", arrays))
    with pytest.raises(GlimpseError, match="holds no tensors"):
        load(base, write(tmp_path / "b", {}))


def test_folders_that_are_refused(base, good, tmp_path):
    with pytest.raises(GlimpseError, match="no such folder"):
        load(base, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GlimpseError, match="holds neither adapter_model.safetensors nor adapter_model.bin"):
        load(base, tmp_path / "empty")
    (good / "non_lora_trainables.bin").write_bytes(b"x")
    with pytest.raises(GlimpseError, match="non_lora_trainables.bin: weights beside the adapter are not supported"):
        load(base, good)
    (good / "non_lora_trainables.bin").unlink()
    (good / "adapter_config.json").unlink()
    with pytest.raises(GlimpseError, match=r"adapter_config\.json: file is missing"):
        load(base, good)


def test_an_adapter_is_no_model(base, good):
    with pytest.raises(GlimpseError, match=r"LoRA adapter .* not merged; .*--adapter.* gp-jax merge BASE --adapter"):
        GlimpseVLM.from_pretrained(good)


def test_base_and_adapter_in_one_folder(base, good, tmp_path):
    shutil.copytree(base, tmp_path / "both")
    shutil.copytree(good, tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(GlimpseError, match="not merged"):
        load(tmp_path / "both")
    with pytest.raises(GlimpseError, match="not merged"):
        load(tmp_path / "both", good)
    np.testing.assert_array_equal(ask(load(tmp_path / "both", tmp_path / "both")), ask(load(base, good)))


def test_a_model_with_an_adapter_is_not_saved_as_one(base, plain, good, tmp_path):
    vlm = load(base, good)
    with pytest.raises(GlimpseError, match="has a LoRA adapter, .*: save_adapter writes it alone, gp-jax merge .* adds it"):
        vlm.save_pretrained(tmp_path / "saved")
    with pytest.raises(GlimpseError, match="cannot be written, there is none"):
        plain.save_adapter(tmp_path / "saved")
    next(adapted(vlm.model))[1].adapter.scale = 5.0
    with pytest.raises(GlimpseError, match="cannot be written, its layers differ in rank, scale or dropout"):
        vlm.save_adapter(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
