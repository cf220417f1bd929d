"""Models, weights, templates and exports of strangers."""

import io
import json
import random
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np

from tests.fuzz.good import (
    EXPRESSIONS,
    FOLDER_FILES,
    OPCODES,
    PIECES,
    QUESTION,
    STATEMENTS,
    bundled,
    picture,
    tensors,
    torch_bytes,
)
from tests.fuzz.mutations import any_value, as_json, changed, flipped
from tests.fuzz.registry import Made, model, target


@target(12)
def torch_file(rng: random.Random, folder: Path) -> Made:
    """A file of torch.save: its pickle spliced, or the archive damaged."""
    from gp_jax.pretrained.torch_file import read_torch

    path = folder / "x.pt"
    if rng.random() < 0.3:
        path.write_bytes(flipped(rng, torch_bytes()))
    else:
        with zipfile.ZipFile(io.BytesIO(torch_bytes())) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
            for entry in old.infolist():
                data = old.read(entry)
                if entry.filename.endswith("data.pkl"):
                    data = spliced(rng, data)
                elif rng.random() < 0.1:
                    data = flipped(rng, data)
                new.writestr(entry.filename, data)
    return lambda: read_torch(path), path.stat().st_size


def spliced(rng: random.Random, data: bytes) -> bytes:
    """A pickle with opcodes of others."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(2, len(data))
        if rng.random() < 0.5:
            data[at:at] = rng.choice(PIECES)
        elif rng.random() < 0.5:
            data[at:at] = bytes([rng.choice(OPCODES)])
        else:
            data = bytearray(flipped(rng, bytes(data), 2)) or data
    return bytes(data)


@target(8)
def safetensors(rng: random.Random, folder: Path) -> Made:
    """A safetensors file: its header changed, or the whole damaged."""
    from safetensors.numpy import save

    from gp_jax.pretrained.files import SafetensorsSource

    data = save(tensors())
    if rng.random() < 0.4:
        data = flipped(rng, data)
    else:
        length = struct.unpack("<Q", data[:8])[0]
        header = as_json(rng, changed(rng, json.loads(data[8 : 8 + length]), rng.randint(1, 3)))
        data = struct.pack("<Q", len(header)) + header + data[8 + length :]
    path = folder / "model.safetensors"
    path.write_bytes(data)

    def read() -> None:
        source = SafetensorsSource([path], str(path))
        for key in source.shapes:
            source.read(key, ())

    return read, len(data)


def copied(folder: Path) -> int:
    """The bundled model's small files. Returns: their size."""
    for name in FOLDER_FILES:
        shutil.copyfile(bundled() / name, folder / name)
    return sum((folder / name).stat().st_size for name in FOLDER_FILES)


@target(12)
def config(rng: random.Random, folder: Path) -> Made:
    """`config.json` and `generation_config.json` of three families, read as a model and its glimpse."""
    from gp_jax.pretrained.hf_config import glimpse_config, model_config, read_config
    from tests.fuzz.families import FAMILIES

    hf = json.loads((bundled() / "config.json").read_text()) if rng.random() < 0.4 else rng.choice(FAMILIES)
    (folder / "config.json").write_bytes(as_json(rng, changed(rng, hf, rng.randint(1, 3))))
    generation = changed(rng, {"eos_token_id": [2, 3], "pad_token_id": 0}, rng.randint(0, 2))

    def read() -> None:
        found = read_config(folder)
        made = model_config(found, generation if isinstance(generation, dict) else {})
        glimpse_config(found, made)

    return read, (folder / "config.json").stat().st_size


@target(6)
def model_folder(rng: random.Random, folder: Path) -> Made:
    """A model's folder with one file changed: its processor is loaded and asked."""
    from tests.fuzz.rooms import load_processor

    size, name = copied(folder), rng.choice(FOLDER_FILES[2:])
    path = folder / name
    if name.endswith(".jinja"):
        path.write_bytes(template(rng, path.read_text()))
    else:
        value = json.loads(path.read_text())
        if name == "tokenizer.json":  # a thousand places of the vocabulary are of one kind
            part = rng.choice(sorted(value))
            value[part] = changed(rng, value[part], rng.randint(1, 3)) if rng.random() < 0.8 else any_value(rng)
        else:
            value = changed(rng, value, rng.randint(1, 3))
        path.write_bytes(as_json(rng, value))
    image, question = picture(rng.choice(((56, 84), (300, 200), (1, 40), (8, 8)))), rng.choice((QUESTION, "a" * 30 + "!"))
    return lambda: load_processor(folder, model())([[image]], [question]), size


def template(rng: random.Random, text: str) -> bytes:
    """A chat template that was changed, damaged, or is meant badly."""
    if rng.random() < 0.4:
        return flipped(rng, text.encode())
    at = rng.choice([0, len(text), *(n for n, letter in enumerate(text) if letter == "{")])
    return (text[:at] + rng.choice(STATEMENTS) + (text[at:] if rng.random() < 0.7 else "")).encode()


@target(6)
def adapter(rng: random.Random, folder: Path) -> Made:
    """A LoRA adapter: its configuration or its tensors' names and shapes changed."""
    from safetensors.numpy import save

    from gp_jax.pretrained.adapters import StoredAdapter, linear_shapes

    size_out, size_in = linear_shapes(model())["self_attn.q_proj"]
    shapes, name = {"lora_A": (4, size_in), "lora_B": (size_out, 4)}, "base_model.model.model.layers.1.self_attn.q_proj"
    data = save({f"{name}.{half}.weight": np.ones(shape, np.float32) for half, shape in shapes.items()})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none", "use_rslora": False, "use_dora": False}
    settings |= {"target_modules": rng.choice((["layers.1.self_attn.q_proj"], r".*\.1\..*q_proj")), "exclude_modules": None}
    settings |= {"layers_to_transform": rng.choice((None, [1])), "layers_pattern": None, "init_lora_weights": True, "rank_pattern": {}}
    if rng.random() < 0.7:
        settings = changed(rng, settings, rng.randint(1, 3))
        if isinstance(settings, dict) and rng.random() < 0.1:
            settings["target_modules"] = rng.choice(EXPRESSIONS)
    elif rng.random() < 0.5:
        data = flipped(rng, data)
    else:
        length = struct.unpack("<Q", data[:8])[0]
        header = as_json(rng, changed(rng, json.loads(data[8 : 8 + length]), rng.randint(1, 3)))
        data = struct.pack("<Q", len(header)) + header + data[8 + length :]
    (folder / "adapter_config.json").write_bytes(as_json(rng, settings))
    (folder / "adapter_model.safetensors").write_bytes(data)
    return lambda: StoredAdapter.open(folder, model()), len(data) + (folder / "adapter_config.json").stat().st_size


@target(6)
def exports(rng: random.Random, folder: Path) -> Made:
    """`export.json` of an exported program: a request is made with it."""
    from gp_jax.ahead.artifact.inputs import artifact_inputs

    buckets = {"patches": [512], "prompt": [256], "kept": [64], "decode": [16], "batch": [2]}
    facts = {"glimpse": True, "plan": "glimpse", "buckets": buckets, "prune": {"reduce_threshold": 0.5, "max_remain_ratio": None}}
    (folder / "processor").mkdir()
    size = copied(folder / "processor")
    (folder / "export.json").write_bytes(as_json(rng, changed(rng, facts, rng.randint(0, 3))))
    return lambda: artifact_inputs(folder, picture(), QUESTION), size + (folder / "export.json").stat().st_size
