"""Checkpoints that do not fit: one short line with the likely cause, before a model is built or a tensor is read."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gp_jax import GlimpseError, GlimpseVLM
from gp_jax.pretrained import files
from gp_jax.tiny import CONFIG, make_checkpoint

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    make_checkpoint(folder)
    for name in (files.GLIMPSE_TENSORS, files.GLIMPSE_TORCH):
        (folder / name).unlink()
    return folder


def edited(source, folder, change=None, config=None):
    """A copy with changed keys (`change`: key -> key or None, or a function on the dict of tensors) and settings."""
    shutil.copytree(source, folder)
    said = json.loads((folder / "config.json").read_text())
    for name, value in (config or {}).items():
        said[name] = said[name] | value if isinstance(value, dict) and isinstance(said.get(name), dict) else value
    (folder / "config.json").write_text(json.dumps(said))
    if change:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(folder, match: str, most: int = 1000) -> str:
    begun = time.monotonic()
    with pytest.raises(GlimpseError, match=match) as error:
        GlimpseVLM.from_pretrained(folder)
    text = str(error.value)
    assert time.monotonic() - begun < 5 and len(text) < most and text.isprintable(), text
    return text


def packed(*names: str):
    """Every projection's weight as these tensors instead."""

    def change(tensors):
        found = {}
        for key, value in tensors.items():
            stem = key.removesuffix("weight")
            own = key.endswith("_proj.weight") and "visual" not in key
            found |= {f"{stem}{name}": np.zeros(1, np.float32) for name in names} if own else {key: value}
        return found

    return change


def prefixed(prefix: str):
    return lambda tensors: {f"{prefix}{key}": value for key, value in tensors.items()}


KEYS = {
    "awq": (packed("qweight", "qzeros", "scales"), "quantised .AWQ or GPTQ"),
    "gptq": (packed("qweight", "qzeros", "scales", "g_idx"), "quantised .AWQ or GPTQ"),
    "bitsandbytes 4": (
        packed("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
        "quantised .bitsandb",
    ),
    "bitsandbytes 8": (packed("weight", "SCB"), "quantised .bitsandbytes"),
    "fp8": (packed("weight", "weight_scale_inv"), "quantised .fp8"),
    "compressed": (packed("weight_packed", "weight_scale", "weight_shape"), "quantised .compressed-tensors"),
    "hqq": (packed("W_q", "meta"), "quantised .HQQ"),
    "quanto": (packed("weight._data", "weight._scale"), "quantised .HQQ, AQLM or quanto"),
    "aqlm": (packed("codes", "codebooks", "scales"), "quantised .HQQ, AQLM"),
    "lora": (packed("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"), "LoRA .* not merged"),
    "peft": (prefixed("base_model.model."), "begin with 'base_model.model.'"),
    "parallel": (prefixed("module."), "begin with 'module.'"),
    "compiled": (prefixed("_orig_mod."), "begin with '_orig_mod.'"),
    "inner model": (lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()}, "lack the beginning 'model.'"),
    "inner nested model": (
        lambda tensors: {
            k.removeprefix("model.") if "visual" in k else k.replace("model.", "language_model.", 1): v for k, v in tensors.items()
        },
        "lack the beginning 'model.'",
    ),
    "qwen2-vl": (lambda tensors: {k.replace("gate_proj", "fc1"): v for k, v in tensors.items() if "up_proj" not in k}, "Qwen2-VL"),
    "llava": (
        lambda tensors: (
            {k.replace("visual.", "vision_tower."): v for k, v in tensors.items()}
            | {"multi_modal_projector.linear_1.weight": np.zeros(1, np.float32)}
        ),
        "LLaVA in the layout of transformers",
    ),
    "text": (lambda tensors: {k: v for k, v in tensors.items() if "visual" not in k}, "without a vision tower"),
    "missing shard": (
        lambda tensors: {k: v for k, v in tensors.items() if ".layers.5." not in k},
        "holds 5 layers of the decoder .*says 6",
    ),
    "one key of each": (lambda tensors: {k: v for k, v in tensors.items() if "o_proj" not in k}, r"o_proj\.weight \(6 times\)"),
}


@pytest.mark.parametrize("change, match", KEYS.values(), ids=KEYS)
def test_likely_causes_by_keys(source, tmp_path, change, match):
    text = refused(edited(source, tmp_path / "model", change), match)
    assert text.startswith("weights do not fit the config: ")


SAID = {
    "awq": "awq",
    "gptq": "gptq",
    "bitsandbytes": "bitsandbytes",
    "fp8": "fp8",
    "\x1b]0;x\x07": "x1b.0;x",
    "compressed-tensors": "compressed",
}


@pytest.mark.parametrize("method, match", SAID.items())
@pytest.mark.parametrize("inside", [False, True])
def test_quantised_by_the_config(source, tmp_path, method, match, inside):
    """Before anything is read: there are no weights at all."""
    settings = {"quantization_config": {"quant_method": method, "bits": 4}}
    folder = edited(source, tmp_path / "model", config={"text_config": settings} if inside else settings)
    os.remove(folder / "model.safetensors")
    refused(folder, f"config.json: quantization_config: the checkpoint is quantised .*{match}")


def test_every_key_of_a_large_model(source, tmp_path):
    """Thousands of keys that fit nothing."""

    def change(tensors):
        return {f"{'x' * 90}.{n}.{key}": np.zeros(1, np.float32) for key in tensors for n in range(20)}

    refused(edited(source, tmp_path / "model", change), "holds 0 layers of the decoder")
    wide = {"text": lambda t: t | {f"surprise.{'y' * 200}{n}": np.zeros(1, np.float32) for n in range(500)}}
    assert "and 496 more" in refused(edited(source, tmp_path / "wide", wide["text"]), "500 unknown")


def test_names_of_strangers_are_shown_harmlessly(source, tmp_path):
    folder = edited(source, tmp_path / "model", lambda tensors: tensors | {"\x1b]0;x\x07\u202e": np.zeros(1, np.float32)})
    assert r"\x1b]0;x\x07\u202e" in refused(folder, "1 unknown")


SIZES = {
    "layers": ({"num_hidden_layers": 512}, "holds 6 layers of the decoder .*says 512"),
    "fewer layers": ({"num_hidden_layers": 2, "selected_layers": [1], "reduce_layer": 1, "le_layers": [0]}, "holds 6 .*says 2"),
    "depth": ({"vision_config": {"depth": 512}}, "holds 4 blocks of the vision tower .*says 512"),
    "width": ({"hidden_size": 2**16, "vision_config": {"out_hidden_size": 2**16}, "num_attention_heads": 2**12}, "mis-shaped"),
    "vocabulary": ({"vocab_size": 2**20}, "mis-shaped"),
    "inner": ({"intermediate_size": 2**20}, "mis-shaped"),
    "tower": ({"vision_config": {"hidden_size": 2**16, "num_heads": 2**6, "intermediate_size": 2**16}}, "mis-shaped"),
    "everything": (
        {
            "hidden_size": 2**16,
            "num_attention_heads": 2**12,
            "vocab_size": 2**20,
            "intermediate_size": 2**20,
            "vision_config": {"hidden_size": 2**16, "num_heads": 2**6, "intermediate_size": 2**16, "out_hidden_size": 2**16},
        },
        "mis-shaped",
    ),
}


@pytest.mark.parametrize("config, match", SIZES.values(), ids=SIZES)
def test_sizes_are_compared_before_anything_is_built(source, tmp_path, config, match):
    if "hidden_size" in config:
        config = config | {
            "num_key_value_heads": config["num_attention_heads"],
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        }
    refused(edited(source, tmp_path / "model", config=config), match)


def test_the_tower_of_llava_likewise(tmp_path):
    import tiny_llava

    folder = tiny_llava.save_original(tmp_path / "llava", tiny_llava.hf_model(), inside=False)
    config = json.loads((folder / "vision_tower" / "config.json").read_text())
    (folder / "vision_tower" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 400}))
    refused(folder, "holds 4 blocks of the vision tower .*says 400")


def test_a_tower_of_an_impossible_name(tmp_path):
    import tiny_llava

    folder = tiny_llava.save_original(tmp_path / "llava", tiny_llava.hf_model(), tower="tower")
    for name in ("x" * 300, "~nobody-here/x", "a\0b", "/dev/null", ["x"]):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": name}))
        refused(folder, r"config\.json: mm_vision_tower")


def header(path, entries: object, data: bytes = b"", length: int | None = None) -> None:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "deep": (b"[" * 100_000, {}),
    "deep entry": (b'{"a":' * 2000 + b"1" + b"}" * 2000, {}),
    "huge length": ({}, {"length": 2**63}),
    "no object": ([], {}),
    "text": ({"a": "x"}, {}),
    "bare": ({"a": {}}, {}),
    "dtype": ({"a": entry(dtype="F33")}, {}),
    "dtype of numbers": ({"a": entry(dtype=[1])}, {}),
    "negative": ({"a": entry(shape=(-1,))}, {}),
    "fraction": ({"a": entry(shape=(1.0,))}, {}),
    "huge": ({"a": entry(shape=(2**62, 4))}, {}),
    "wraps": ({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}, {}),
    "huge with 0": ({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, {}),
    "backwards": ({"a": entry(offsets=(4, 0))}, {}),
    "beyond": ({"a": entry(offsets=(400, 404))}, {}),
    "not UTF-8": (b'{"\xff": 1}', {}),
    "twice": (b'{"a": %s, "a": %s}' % (json.dumps(entry()).encode(), json.dumps(entry(offsets=(9**9, 9**9 + 4))).encode()), {}),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", {}),
}


@pytest.mark.parametrize("entries, options", HEADERS.values(), ids=HEADERS)
def test_headers_without_sense(source, tmp_path, entries, options):
    folder = edited(source, tmp_path / "model")
    header(folder / "model.safetensors", entries, b"\0" * 4, **options)
    refused(folder, "model.safetensors: is not a readable|weights do not fit")


def test_a_header_larger_than_any(source, tmp_path):
    folder = edited(source, tmp_path / "model")
    header(folder / "model.safetensors", b" " * (5 << 20))
    refused(folder, "is not a readable safetensors file .a header of")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(folder, "pointer of Git LFS")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json", "pytorch_model.bin"])
def test_what_is_no_regular_file(source, tmp_path, name):
    for kind in ("folder", "pipe", "device"):
        folder = edited(source, tmp_path / kind)
        for path in (folder / "model.safetensors", folder / name):
            path.unlink(missing_ok=True)
        if kind == "folder":
            (folder / name).mkdir()
        elif kind == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to("/dev/zero")
        refused(folder, f"{name}: is (a folder, not a file|not a regular file)")


NAMES = ["~nobody-here/x", "x" * 300, "a\0b", "\ud800", "/" + "y/" * 3000, "no/such/folder", "/dev/null", "./nothing"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_are_no_folder(name):
    with pytest.raises(GlimpseError) as error:
        files.find_model(name, ("*.json",))
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_a_pipe_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GlimpseError, match="is no folder"):
        files.find_folder(tmp_path / "pipe", ())
    assert files.find_folder("scenes", ()) == files.BUNDLED["scenes"] and CONFIG["num_hidden_layers"] == 6
