"""Makes requests for an exported program, without its weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gp_jax.ahead.artifact.facts import read_facts
from gp_jax.ahead.artifact.names import FACTS, PROCESSOR
from gp_jax.errors import GlimpseError
from gp_jax.inference.function import fitting_inputs
from gp_jax.inference.look_inputs import first_buckets
from gp_jax.inference.requests import resolve
from gp_jax.pretrained.hf_config import glimpse_config, model_config, read_config
from gp_jax.processing.images import ImageLike
from gp_jax.processing.qwen import as_batch
from gp_jax.processing.table import load_processor
from gp_jax.pruning.rule import Prune
from gp_jax.runtime.disk import path_of, read_json


def artifact_inputs(
    folder: str | Path,
    images: ImageLike | Sequence,
    questions: str | Sequence[str],
    *,
    system: str | None = None,
    prune: Prune | None = None,
    shrink: bool = True,
) -> dict[str, np.ndarray]:
    """The inputs of an exported program for a request. Only small files of its folder are read, no weights.

    Args:
        folder: that `gp-jax export` wrote; images, questions: as for `GlimpseVLM.answer`, at most the program's batch.
        prune: another keep rule with the same method; None: that of the export.
        shrink: whether pictures with too many visual tokens for the program are scaled down; otherwise they are an error.
    Returns: a dict of numpy arrays for `np.savez` or the program itself. Raises: GlimpseError.
    """
    folder = path_of(folder)
    facts, own, buckets = read_facts(folder)
    home = folder / PROCESSOR
    hf_config = read_config(home)
    config = model_config(hf_config, read_json(home / "generation_config.json", required=False), str(home / "config.json"))
    glimpse = glimpse_config(hf_config, config, str(home / "config.json")) if facts.glimpse else None
    depth = config.text.num_hidden_layers
    try:
        plan = resolve(own, glimpse, depth)[0]
    except GlimpseError as error:
        raise GlimpseError(f"{folder / FACTS}: prune: {error}") from error
    if prune is not None and resolve(prune, glimpse, depth)[0] != plan:
        raise GlimpseError(f"prune: method '{prune.method}' is not what {folder} was exported for, plan {facts.plan or 'dense'}")
    if prune is not None and first_buckets(config, prune.look, buckets) != first_buckets(config, own.look if own else None, buckets):
        raise GlimpseError(f"prune: {folder} was exported for another look, or none: share, windows and random must be those of the export")
    pictures, questions = as_batch(images, questions)
    made = fitting_inputs(load_processor(home, config), pictures, questions, glimpse, prune or own, buckets, system=system, shrink=shrink)
    return made[1]
