"""Adapters in PEFT's files, written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models as tiny
from safetensors.numpy import save_file

from gp_jax import GlimpseVLM
from gp_jax.models.adapter import module_names
from gp_jax.pretrained.adapters import linear_shapes

NESTED, FLAT = "model.language_model.layers.", "model.layers."
SAMPLES = [[5, (4, 6), 7], [3, (2, 2), 9]]


def load(base: Path, adapter: Path | None = None, **options: Any) -> GlimpseVLM:
    """A model of `tiny_models`."""
    return GlimpseVLM.from_pretrained(base, ladders=tiny.LADDERS, adapter=adapter, **options)


def ask(vlm: GlimpseVLM) -> np.ndarray:
    """The logits of the first new token of two samples."""
    return vlm.generate(**tiny.inputs(SAMPLES), prune=None, max_new_tokens=3, eos_token_id=None).first_logits


def tensors(vlm: GlimpseVLM, rank: int = 4, prefix: str = NESTED, chosen: Callable[[str], bool] = lambda name: True, seed: int = 0) -> dict:
    """Random A and B of the chosen layers, by PEFT's names. chosen: of `models.adapter.module_names`."""
    rng, found = np.random.default_rng(seed), {}
    shapes = linear_shapes(vlm.config)
    for name, path in module_names(vlm.config.text.num_hidden_layers):
        if chosen(name):
            size_out, size_in = shapes[path.split(".", 3)[-1]]
            module = f"base_model.model.{prefix}{name.removeprefix(FLAT)}"
            found[f"{module}.lora_A.weight"] = (rng.normal(size=(rank, size_in)) / size_in**0.5).astype(np.float32)
            found[f"{module}.lora_B.weight"] = (0.3 * rng.normal(size=(size_out, rank))).astype(np.float32)
    return found


def write(folder: Path, arrays: dict, rank: int = 4, **changes: Any) -> Path:
    """An adapter's folder. changes: of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none", "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(arrays, folder / "adapter_model.safetensors")
    return folder
