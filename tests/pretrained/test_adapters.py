"""LoRA adapters in PEFT's files: the released numbers, PEFT itself in both directions, and what is refused by name."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_llava
import tiny_models as tiny
import torch
from adapter_tools import FLAT, NESTED, SAMPLES, ask, load, tensors, write
from safetensors.numpy import load_file

from gp_jax import GlimpseError, GlimpseVLM, Prune, inference_params, make_mesh
from gp_jax.models.adapter import AdapterConfig, adapted, attach, merge, without_adapter
from gp_jax.pretrained.adapter_config import meant_by
from gp_jax.pretrained.adapters import save_adapter
from gp_jax.runtime.clock import COMPILES

HALVES = ("lora_A", "lora_B")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("adapters"), tiny.hf_model()
    model.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def plain(base) -> GlimpseVLM:
    return load(base)


@pytest.fixture
def good(plain, tmp_path) -> Path:
    return write(tmp_path / "adapter", tensors(plain))


def halves(vlm: GlimpseVLM) -> dict[str, np.ndarray]:
    return {f"{path}.{half}": np.asarray(getattr(linear.adapter, half)[...]) for path, linear in adapted(vlm.model) for half in HALVES}


# The released numbers ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plus(shared) -> tuple[Path, dict[str, np.ndarray]]:
    folder = shared / "goldens" / "qwen2_5_vl_gp_plus"
    if not folder.is_dir():
        pytest.skip("the goldens of GlimpsePrune+ are not here")
    with np.load(folder / "golden.npz") as file:
        return folder, dict(file)


@pytest.fixture(scope="module")
def tuned(golden_folder, plus) -> GlimpseVLM:
    return GlimpseVLM.from_pretrained(golden_folder, adapter=plus[0])


def golden_run(vlm: GlimpseVLM, golden: dict, group: str, kind: str):
    inputs = {name: golden[f"{group}.{name}"] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    prune = {"unpruned": None, "refmask": Prune(reference_masks=[golden[f"{group}.ref_mask"]])}
    if kind == "free":
        prune["free"] = Prune(reduce_threshold=float(golden[f"{group}.merged.free.reduce_threshold"]))
    return vlm.generate(**inputs, prune=prune[kind], max_new_tokens=12, eos_token_id=None)


@pytest.mark.parametrize("group", ["A", "B"])
def test_the_released_numbers(tuned, plus, group):
    golden, merged, bare = plus[1], tuned.with_model(merge(tuned.model)), tuned.with_model(without_adapter(tuned.model))
    for kind in ("unpruned", "refmask"):
        for vlm, name in ((tuned, "policy"), (merged, "merged"), (bare, "base")):
            done = golden_run(vlm, golden, group, kind)
            np.testing.assert_allclose(done.first_logits, golden[f"{group}.{name}.{kind}.last_logits"], atol=1e-4, rtol=0)
            if name != "base":
                np.testing.assert_array_equal(done.tokens, golden[f"{group}.{name}.{kind}.generated"])
    for vlm in (tuned, merged):  # with the base's own glimpse
        done = golden_run(vlm, golden, group, "free")
        np.testing.assert_array_equal(np.concatenate(done.keep), golden[f"{group}.merged.free.keep"])
        np.testing.assert_allclose(np.concatenate(done.mask_logits), golden[f"{group}.merged.free.mask_logits"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(done.first_logits, golden[f"{group}.merged.free.last_logits"], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(done.tokens, golden[f"{group}.merged.free.generated"])


def test_the_released_weights_merged(tuned, plus):
    layers = merge(tuned.model).decoder.layers
    for name, value in plus[1].items():
        if name.startswith("merged.weight."):
            number, part, linear = name.removeprefix("merged.weight.model.layers.").split(".")
            weight = getattr(getattr(layers[int(number)], part), linear).weight[...]
            np.testing.assert_allclose(np.asarray(weight), value, atol=1e-6, rtol=0)


def test_the_released_adapter_comes_back(tuned, plus, tmp_path):
    """With the names of today's transformers, which PEFT needs: it does not know the older ones."""
    tuned.save_adapter(tmp_path / "saved")
    ours, theirs = load_file(tmp_path / "saved" / "adapter_model.safetensors"), load_file(plus[0] / "adapter_model.safetensors")
    assert {key.replace("model.language_model.", "model.") for key in ours} == theirs.keys() and len(ours) == 84
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key.replace("model.language_model.", "model.")])
    said = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["task_type"], said["inference_mode"]) == (4, 8, "CAUSAL_LM", True)


# PEFT itself -------------------------------------------------------------------------------------------------------------------------


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(**tiny.torch_inputs(tiny.inputs(SAMPLES))).logits[:, -1].numpy()


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="PEFT, the oracle of adapter files, is not installed")


SETTINGS = {
    "all linear layers": dict(target_modules=r"model\.language_model\..*_proj", lora_alpha=16),
    "names": dict(target_modules=["q_proj", "v_proj", "language_model.layers.0.mlp.gate_proj"], use_rslora=True),
    "some layers": dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    "not some": dict(target_modules=["q_proj", "k_proj", "down_proj"], exclude_modules=r".*visual.*|.*layers\.1\..*", lora_dropout=0.1),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_writes_what_is_read_and_reads_what_is_written(base, peft, settings, tmp_path):
    theirs = peft.get_peft_model(tiny.hf_model(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    vlm = load(base, tmp_path / "theirs")
    np.testing.assert_allclose(ask(vlm), torch_logits(theirs), atol=1e-4, rtol=0)
    assert np.abs(ask(vlm) - ask(vlm.with_model(without_adapter(vlm.model)))).max() > 1e-2

    vlm.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny.hf_model(), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again), ask(vlm), atol=1e-4, rtol=0)
    assert all(parameter.isfinite().all() for parameter in again.parameters())
    model = tiny.hf_model()
    model.load_adapter(str(tmp_path / "ours"))  # transformers' own way
    np.testing.assert_allclose(torch_logits(model), ask(vlm), atol=1e-4, rtol=0)


def test_peft_reads_an_adapter_of_llava(peft, tmp_path):
    """Full names: CLIP's layers have the same ends."""
    model = tiny_llava.hf_model()
    vlm = GlimpseVLM.from_pretrained(tiny_llava.save_hf(tmp_path / "base", model))
    attach(vlm.model, AdapterConfig(r=2, lora_alpha=4))
    save_adapter(vlm.model, tmp_path / "adapter", None)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    found = [name for name, _ in tuned.named_modules() if name.endswith(".lora_A.default")]
    assert len(found) == 7 * vlm.config.text.num_hidden_layers and all(".language_model." in name for name in found)


# What must not change a result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [NESTED, FLAT, "language_model.model.layers."])
def test_names_of_all_versions(base, plain, good, prefix, tmp_path):
    names = ["self_attn.q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "mlp.up_proj", "down_proj"]
    other = write(tmp_path / "other", tensors(plain, prefix=prefix), target_modules=names)
    np.testing.assert_array_equal(ask(load(base, other)), ask(load(base, good)))


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_llava_in_both_layouts(layout, tmp_path):
    save = tiny_llava.save_hf if layout == "hf" else tiny_llava.save_original
    vlm = GlimpseVLM.from_pretrained(save(tmp_path / "base", tiny_llava.hf_model()))
    adapter = write(tmp_path / "adapter", tensors(vlm, prefix=FLAT if layout == "original" else NESTED))
    tuned = GlimpseVLM.from_pretrained(tmp_path / "base", adapter=adapter)
    tuned.save_adapter(tmp_path / "saved")
    ours, theirs = load_file(tmp_path / "saved" / "adapter_model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_a_torch_file_is_read_too(base, good, tmp_path):
    other = tmp_path / "torch"
    shutil.copytree(good, other)
    arrays = load_file(other / "adapter_model.safetensors")
    (other / "adapter_model.safetensors").unlink()
    torch.save({key: torch.tensor(value) for key, value in arrays.items()}, other / "adapter_model.bin")
    np.testing.assert_array_equal(ask(load(base, other)), ask(load(base, good)))


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float64], ids=lambda kind: np.dtype(kind).name)
def test_any_float_is_read_as_float32(base, plain, kind, tmp_path):
    arrays = {key: value.astype(kind) for key, value in tensors(plain).items()}
    vlm = load(base, write(tmp_path / "x", arrays))
    for path, value in halves(vlm).items():
        assert value.dtype == np.float32, path
    key = NESTED + "1.mlp.up_proj.lora_A.weight"
    np.testing.assert_array_equal(halves(vlm)["decoder.layers.1.mlp.up_proj.lora_A"], arrays[f"base_model.model.{key}"].astype(np.float32))


def test_a_base_in_bfloat16(base, good, tmp_path):
    """The adapter stays in float32, and nothing but rounding tells it from the merged model."""
    vlm = load(base, good, dtype="bfloat16")
    assert {value.dtype for value in halves(vlm).values()} == {np.dtype(np.float32)}
    beside, merged = ask(vlm), ask(vlm.with_model(merge(vlm.model)))
    assert vlm.model.decoder.layers[0].mlp.up_proj.weight.dtype == jnp.bfloat16
    exact = ask(load(base, good))
    moved = np.abs(exact - ask(load(base))).max()
    assert max(np.abs(beside - exact).max(), np.abs(merged - exact).max()) < 0.2 * moved


def test_rank_stabilised_scale(base, plain, tmp_path):
    arrays = tensors(plain)
    stabilised = write(tmp_path / "a", arrays, use_rslora=True, lora_alpha=8)
    usual = write(tmp_path / "b", arrays, lora_alpha=16)  # 8 / sqrt(4) = 16 / 4
    vlm = load(base, stabilised)
    np.testing.assert_array_equal(ask(vlm), ask(load(base, usual)))
    vlm.save_adapter(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["lora_alpha"] == 16
    np.testing.assert_array_equal(ask(load(base, tmp_path / "saved")), ask(vlm))


def test_a_part_of_the_layers(base, plain, tmp_path):
    arrays = tensors(plain, chosen=lambda name: ".1." in name and name.endswith(("q_proj", "up_proj")))
    folder = write(tmp_path / "a", arrays, target_modules=r".*\.layers\.1\.(self_attn\.q_proj|mlp\.up_proj)")
    vlm = load(base, folder)
    assert {path for path, _ in adapted(vlm.model)} == {"decoder.layers.1.self_attn.q_proj", "decoder.layers.1.mlp.up_proj"}
    vlm.save_adapter(tmp_path / "saved")
    np.testing.assert_array_equal(ask(load(base, tmp_path / "saved")), ask(vlm))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.filterwarnings("ignore:.*key-value heads")
def test_eight_devices_are_one(base, good, shape, tmp_path):
    mesh = make_mesh(*shape)
    sharded, one = load(base, good, mesh=mesh), load(base, good)
    np.testing.assert_allclose(ask(sharded), ask(one), atol=1e-4, rtol=0)
    half = sharded.model.decoder.layers[0].mlp.gate_proj.adapter.lora_A[...]
    assert half.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    sharded.save_adapter(tmp_path / "saved")
    for path, value in halves(load(base, tmp_path / "saved")).items():
        np.testing.assert_array_equal(value, halves(one)[path])


def test_new_parameters_compile_nothing(base, good):
    vlm = load(base, good)
    first, params = ask(vlm), inference_params(vlm.model)
    linear = params["decoder"]["layers"]["0"]["self_attn"]["q_proj"]["adapter"]
    before = COMPILES.count
    vlm.update({"decoder": {"layers": {"0": {"self_attn": {"q_proj": {"adapter": {"lora_B": np.asarray(linear["lora_B"]) * 3}}}}}}})
    assert np.abs(ask(vlm) - first).max() > 1e-3 and COMPILES.count == before
    vlm.update({"decoder": {"layers": {"0": {"self_attn": {"q_proj": {"adapter": {"lora_B": np.asarray(linear["lora_B"])}}}}}}})
    np.testing.assert_array_equal(ask(vlm), first)
    with pytest.raises(GlimpseError, match=r"adapter\.lora_B has the shape \(32, 3\)"):
        vlm.update({"decoder": {"layers": {"0": {"self_attn": {"q_proj": {"adapter": {"lora_B": np.zeros((32, 3), np.float32)}}}}}}})


def test_names_are_matched_as_peft_matches_them():
    name = "model.layers.11.self_attn.q_proj"
    for names, expected in (
        (("q_proj",), True), (("proj",), False), (("self_attn.q_proj",), True), (("layers.1.self_attn.q_proj",), False),
        (("1.self_attn.q_proj",), False), (("model.language_model.layers.11.self_attn.q_proj",), True), (("k_proj", "o_proj"), False),
        ("q_proj", False), (".*q_proj", True), (r"language_model\.model\..*", True), ("ALL-linear", True), ((), False),
    ):  # fmt: skip
        assert (meant_by(names, [name], "x") == {name}) is expected, names
