"""Writing models atomically: the base for transformers, the glimpse for the released code and for this package."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gp_jax.config.model import GlimpseConfig
from gp_jax.errors import GlimpseError
from gp_jax.models.adapter import adapted
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained import files, params
from gp_jax.pretrained.hf_config import flat_hf_config
from gp_jax.pretrained.torch_file import write_torch
from gp_jax.pretrained.tower import copy_beside


def save_model(
    model: LVLM,
    hf_config: dict[str, Any],
    folder: Path,
    *,
    source: Path | None,
    nested: bool,
    progress: Callable[[list], Iterable] = iter,
    more: Mapping[str, str] | None = None,
) -> None:
    """Writes everything that `GlimpseVLM.from_pretrained(folder)` reads. A failed save leaves nothing behind.

    Args:
        hf_config: the base's `config.json`.
        source: folder whose tokenizer and processor files are copied.
        nested: whether the base's tensors get nested keys (`names.Names.nested_key`).
        more: texts that are written beside them, by file name.
    Raises: GlimpseError with an adapter, which a checkpoint cannot hold.
    """
    if any(adapted(model)):
        ways = "save_adapter writes it alone, gp-jax merge (or models.adapter.merge) adds it to the weights"
        raise GlimpseError(f"{folder}: the model has a LoRA adapter, which is not saved with its base: {ways}")
    base = params.export_base(model, nested)
    with files.staged(folder) as scratch:
        files.write_shards(scratch, base, progress=progress)
        write_config(model, hf_config, scratch)
        write_glimpse(model, scratch)
        if source:
            copy_beside(source, scratch)
        for name, text in (more or {}).items():
            (scratch / name).write_text(text)
        fresh = {path.name for path in scratch.iterdir()}
    files.remove_stale_weights(folder, fresh)


def save_glimpse(model: LVLM, hf_config: dict[str, Any], folder: Path) -> None:
    """Writes a released-style glimpse folder: config.json and new_modules_gp.pt, and glimpse.safetensors beside them."""
    if model.glimpse_config is None:
        raise GlimpseError("there is no glimpse to save")
    with files.staged(folder) as scratch:
        write_config(model, hf_config, scratch)
        write_glimpse(model, scratch)


def write_config(model: LVLM, hf_config: dict[str, Any], folder: Path) -> None:
    """Writes config.json, with the dtype of the weights and whether the model's output head is tied."""
    config = said_tied(hf_config, model.config.text.tie_word_embeddings)
    config = flat_hf_config(config, model.glimpse_config) if model.glimpse_config else config
    name = "dtype" if "dtype" in config else "torch_dtype"
    config = {k: v for k, v in config.items() if k != files.CHOSEN} | {name: str(model.decoder.embed_tokens.dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def plain_hf_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` without the fields and the type that a glimpse gives it."""
    glimpse = {field.name for field in dataclasses.fields(GlimpseConfig)}
    plain = {name: value for name, value in hf_config.items() if name not in glimpse}
    return plain | {"model_type": hf_config["model_type"].removesuffix("_gp")}


def said_tied(hf_config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """A `config.json` with `tie_word_embeddings` set to `tied`, outer and inner; unchanged if it is set so already."""
    flag, text = "tie_word_embeddings", hf_config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    if bool(hf_config.get(flag) or inner.get(flag)) == tied:
        return hf_config
    return hf_config | {flag: tied} | ({"text_config": inner | {flag: tied}} if inner else {})


def write_glimpse(model: LVLM, folder: Path) -> None:
    """Writes the glimpse in both formats; nothing for a model without one."""
    tensors = params.export_glimpse(model)
    if tensors:
        arrays = {key: np.asarray(value) for key, value in tensors.items()}
        files.write_tensors(folder / files.GLIMPSE_TENSORS, arrays)
        write_torch(folder / files.GLIMPSE_TORCH, params.nested_glimpse(arrays))
