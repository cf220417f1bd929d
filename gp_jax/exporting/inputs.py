"""Requests for an exported program, made without its weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gp_jax.buckets import Ladder, Ladders
from gp_jax.config import ModelConfig
from gp_jax.exporting.layout import FACTS, PROCESSOR
from gp_jax.glimpse.select import Prune
from gp_jax.images import MAX_PIXELS, ImageLike
from gp_jax.inference import inference_inputs
from gp_jax.layout import read_samples
from gp_jax.pretrained.files import read_json
from gp_jax.pretrained.hf_config import glimpse_config, model_config, read_config
from gp_jax.processing import as_batch
from gp_jax.processors import load_processor
from gp_jax.vlm import ARRAYS

TEXT_ROWS = 128  # of a prompt, left to the question when pictures are scaled down to what fits


def artifact_inputs(
    folder: str | Path,
    images: ImageLike | Sequence,
    questions: str | Sequence[str],
    *,
    system: str | None = None,
    prune: Prune | None = None,
    shrink: bool = False,
) -> dict[str, np.ndarray]:
    """A request for an exported program, made from its folder alone: no weights are read.

    Args:
        folder: of `gp-jax export`; images, questions: as of `GlimpseVLM.answer`, up to the batch.
        prune: another keep rule of the same kind; None: that of the export.
        shrink: scale larger pictures down to what the program holds; else they are an error.
    Returns: a dict of numpy arrays for `np.savez` or the program itself. Raises: GlimpseError.
    """
    folder = Path(folder)
    facts, home = read_json(folder / FACTS), folder / PROCESSOR
    hf_config = read_config(home)
    config = model_config(hf_config, read_json(home / "generation_config.json", required=False), str(home / "config.json"))
    glimpse = glimpse_config(hf_config, config, str(home / "config.json")) if facts["glimpse"] else None
    buckets = Ladders(**{name: Ladder(name, tuple(rungs)) for name, rungs in facts["buckets"].items()})
    prune = prune or (Prune(**facts["prune"]) if facts["prune"] else None)
    processor = load_processor(home, config)
    own, questions = as_batch(images, questions)
    if shrink:
        processor = processor.limited(picture_capacity(buckets, config) // max(1, *(len(pictures) for pictures in own)))
    raw = processor(own, questions, system, MAX_PIXELS).inputs
    return inference_inputs(read_samples(config, *(raw.get(name) for name in ARRAYS)), config, glimpse, prune, buckets)


def picture_capacity(buckets: Ladders, config: ModelConfig) -> int:
    """Visual tokens that a picture of any shape may have (see `inference_buckets`)."""
    slots = buckets.patches.rungs[-1] // config.vision.merge_unit
    return max(1, min(config.vision.tokens_in(slots), buckets.prompt.rungs[-1] - TEXT_ROWS))
