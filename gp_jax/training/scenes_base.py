"""The stage `base`: trains a whole small model from random weights on generated scenes."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from gp_jax.data.feed import LoadedBatch, Placer, load, local_rows
from gp_jax.errors import GlimpseError
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.hf_config import model_config
from gp_jax.pretrained.params import export_base
from gp_jax.pretrained.saving import save_model
from gp_jax.processing.qwen import Processor
from gp_jax.runtime.disk import read_bytes, read_json
from gp_jax.scenes.feed import LoadScenes, canvas_of
from gp_jax.scenes.questions import FAMILIES
from gp_jax.scenes.settings import ScenesConfig
from gp_jax.sharding import replicated, spread
from gp_jax.training.base_losses import METRICS, Pretraining, losses
from gp_jax.training.base_settings import BaseConfig
from gp_jax.training.build import Progress, build_mesh, plain
from gp_jax.training.checkpoint import read_params, run_folder
from gp_jax.training.export import export
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.run_log import RunLog
from gp_jax.training.step import Counts, StepPrograms, TrainState

VALIDATION_SEED = 10**6  # added to the seed of the training scenes


@dataclass(frozen=True)
class SceneFeed:
    """Draws scenes when they are needed."""

    config: ScenesConfig
    loader: LoadScenes
    batch: int
    accumulation: int

    def load(self, start: int, end: int) -> Iterator[LoadedBatch]:
        """This process's rows of the micro-batches start .. end-1."""
        return load(self.loader, start, end, threads=self.config.threads, prefetch=self.config.prefetch, workers=0)

    def counts(self, step: int) -> Counts:
        """The denominators of a step's losses: a step's loss is the mean over its micro-batches."""
        return Counts(np.float32(self.accumulation), np.float32(self.accumulation))

    def sizes(self, step: int) -> tuple[int, int]:
        """Numbers of pictures and of visual tokens in a step."""
        side = self.loader.side
        canvases = [canvas_of(n, self.loader.end, self.config) for n in range(step * self.accumulation, (step + 1) * self.accumulation)]
        return self.batch * len(canvases), sum(self.batch * (c.width // side) * (c.height // side) for c in canvases)

    def names(self, numbers: Sequence[int]) -> list[str]:
        """Names of the scenes in micro-batches, for messages."""
        return [f"scenes {n * self.batch}..{(n + 1) * self.batch - 1} (seed {self.config.seed})" for n in numbers]

    def epoch(self, step: int) -> float:
        """The share of the run before a step: no scene is seen twice."""
        return step * self.accumulation / self.loader.end


@dataclass(frozen=True)
class BaseRun:
    """Everything that a run needs, before its first step."""

    config: BaseConfig
    hf_config: dict[str, Any]
    folder: Path
    mesh: Mesh | None
    feed: SceneFeed
    validation: SceneFeed
    step: StepPrograms
    identity: dict[str, Any]

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.config.steps

    def model(self, params: Any) -> LVLM:
        """The model without its training heads."""
        return self.step.model(params).model


def build_base(config: BaseConfig) -> BaseRun:
    """Builds a run of an architecture folder. Raises: GlimpseError that names what is wrong."""
    mesh, folder = build_mesh(config), Path(config.model)
    hf_config = read_json(folder / "config.json")
    architecture = model_config(hf_config, read_json(folder / "generation_config.json", required=False))
    processor = Processor.load(folder, architecture)
    if processor.tokenizer is None:
        raise GlimpseError(f"{folder}: has no tokenizer, which training needs")
    if not 0 <= config.scenes.first_cut < architecture.text.num_hidden_layers:
        raise GlimpseError(f"scenes.first_cut={config.scenes.first_cut} is not one of the {architecture.text.num_hidden_layers} layers")
    if not -architecture.text.num_hidden_layers <= config.loss.reading_layer < architecture.text.num_hidden_layers:
        raise GlimpseError(f"loss.reading_layer={config.loss.reading_layer} is not one of the {architecture.text.num_hidden_layers} layers")
    rngs = nnx.Rngs(config.seed)
    module = Pretraining(LVLM(architecture, None, dtype=jnp.float32, rngs=rngs), rngs=rngs)
    if config.start:
        nnx.update(module, read_params(run_folder(config.start) / "checkpoints", nnx.state(module)))
    rows = local_rows(mesh, config.batch_size)
    micro_batches = config.steps * config.accumulation

    def feed(scenes: ScenesConfig, end: int) -> SceneFeed:
        loader = LoadScenes(scenes, processor, rows, config.batch_size, end)
        return SceneFeed(scenes, loader, config.batch_size, config.accumulation)

    step = StepPrograms(
        module,
        lambda path, value: True,
        partial(losses, config=config.loss, remat=config.remat, attention=config.attention),
        METRICS,
        optimizer(config.optim, config.steps),
        learning_rate(config.optim, config.steps),
        seed=config.seed,
        mesh=mesh,
    )
    seed = config.scenes.seed + VALIDATION_SEED
    quiet = dataclasses.replace(config.scenes, pruned=0.0, blackened=0.0, relations=0.0, anchored=0.0, settled=0.0, seed=seed)
    validation = feed(quiet, -(-config.validation_scenes // config.batch_size))
    return BaseRun(config, hf_config, folder, mesh, feed(config.scenes, micro_batches), validation, step, identity(config, folder))


def identity(config: BaseConfig, folder: Path) -> dict[str, Any]:
    """Everything that must be equal for a run to be continued."""
    fields = ("start", "scenes", "loss", "optim", "batch_size", "accumulation", "steps", "seed")
    chosen = {name: value for name, value in plain(config).items() if name in fields}
    for name in ("threads", "prefetch"):
        del chosen["scenes"][name]
    if not chosen["loss"]["reading_weight"]:
        del chosen["loss"]["reading_layer"]  # nothing is read there
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja"))
    digest = hashlib.sha256(b"".join(read_bytes(path, 1 << 30) for path in files)).hexdigest()[:16]
    return {"stage": "base", "model": digest} | chosen


def summary_base(values: dict[str, float]) -> dict[str, float]:
    """Turns the sums of exact matches and of turns per family into shares."""
    rest = {name: value for name, value in values.items() if not name.startswith(("exact_", "turns_"))}
    return rest | {f: values[f"exact_{f}"] / max(values[f"turns_{f}"], 1e-9) for f in FAMILIES}


def validate_base(
    run: BaseRun, state: TrainState, step: int, folder: epath.Path, log: RunLog, progress: Progress, stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """One pass over scenes that are not used for training, with nothing hidden. Returns: mean losses and exact match; None when stopped."""
    place, end = Placer(run.mesh, run.config.batch_size), run.validation.loader.end
    totals: dict[str, float] = {}
    counts = Counts(np.float32(end), np.float32(end))
    for loaded in progress(run.validation.load(0, end), "validating", end):
        if stopped():
            return None
        sums, _ = run.step.evaluate(state, place(loaded.batch, loaded.rows), counts)
        totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
    found = summary_base(totals)
    log.write(step, found, "validation")
    return found


def export_base_run(run: BaseRun, state: TrainState, folder: epath.Path) -> str:
    """Writes `folder`/export: the model in Hugging Face layout, and orbax/ with the same tensors. Returns: a text that names them."""
    share, params = run.config.blend, state.params
    if share < 1:
        params = jax.tree.map(lambda a, b: a + share * (b - a), spread(run.step.params, replicated(run.mesh)), params)
    model = run.model(params)
    write = partial(save_model, model, run.hf_config, source=run.folder, nested=True)
    export(folder, lambda local: write(folder=local), export_base(model, nested=True))
    return "the model (Hugging Face layout, orbax)"


def describe_base(run: BaseRun) -> str:
    """Describes a run in a few lines."""
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(run.model(run.step.params))))
    canvases = ", ".join(f"{c.width}x{c.height}" for c in run.config.scenes.canvases)
    return (
        f"pictures of {canvases} pixels\n{run.steps} steps of {run.config.batch_size} x {run.config.accumulation} pictures, "
        f"{size / 1e6:.2f} M parameters, {jax.device_count()} device(s) in {jax.process_count()} process(es)"
    )
