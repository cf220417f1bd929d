"""Builds a run of the stages `plus` and `sft`. Errors in configuration, model or data are found here, before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gp_jax.buckets import Ladder, Ladders, octaves
from gp_jax.data.collate import Shape
from gp_jax.data.samples import SampleMaker
from gp_jax.data.schedule import Schedule
from gp_jax.data.settings import DataSource
from gp_jax.errors import GlimpseError
from gp_jax.models.adapter import adapted, attach
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.files import GLIMPSE_TENSORS, GLIMPSE_TORCH, weights_digest
from gp_jax.pretrained.params import flat_params
from gp_jax.sharding import parameter_sharding, put
from gp_jax.training.build import Feed, Progress, build_mesh, measured, number_of_steps, plain, records_identity
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.plus.losses import METRICS, SFT_METRICS, answer_losses, policy_losses
from gp_jax.training.plus.questions import LoadQuestions
from gp_jax.training.plus.rollouts import Roller
from gp_jax.training.plus.settings import PlusConfig
from gp_jax.training.step import StepPrograms
from gp_jax.vlm import GlimpseVLM

LEAST_ROWS = 32  # the first rung of rows that stay


@dataclass(frozen=True)
class PlusRun:
    """Everything that a run needs, before its first step."""

    config: PlusConfig
    vlm: GlimpseVLM
    mesh: Mesh | None
    feed: Feed
    validation: Feed | None
    roller: Roller
    step: StepPrograms
    steps: int
    identity: dict[str, Any]

    @property
    def slots(self) -> int:
        """Tokens of a completion, with padding."""
        return self.roller.engine.ladders.decode.rungs[-1]


def build_plus(config: PlusConfig, progress: Progress) -> PlusRun:
    """Loads the model and plans the data. Raises: GlimpseError that names what is wrong."""
    mesh = build_mesh(config)
    vlm = GlimpseVLM.from_pretrained(
        config.model,
        config.glimpse_from,
        config.dtype,
        mesh,
        attention=config.attention,
        progress=True,
        adapter=config.adapter_from,
    )
    if vlm.processor.tokenizer is None:
        raise GlimpseError(f"{config.model}: has no tokenizer, which training needs")
    if not config.adapts and jax.process_count() > 1:
        raise GlimpseError("parameters: are trained in full by one process only; several processes train an adapter")
    made = trained(vlm.model, config, mesh)
    maker = SampleMaker(vlm.processor, 1, config.data.max_visual_tokens, config.data.released_boxes)
    feed = build_questions(config, config.data.sources, maker, progress)
    validation = build_questions(config, config.data.validation, maker, progress) if config.data.validation else None
    vlm = GlimpseVLM(
        made,
        vlm.hf_config,
        vlm.processor,
        folder=vlm.folder,
        mesh=mesh,
        ladders=ladders_of([b for own in (feed, validation) if own for b in own.schedule.buckets], vlm.config.vision.merge_unit, config),
        attention=config.attention,
        nested_keys=vlm.nested_keys,
        name=vlm.name,
    )
    steps = number_of_steps(config, feed.schedule)
    updates = steps * (config.policy.num_iterations if config.stage == "plus" else 1)
    plus = config.stage == "plus"
    losses = partial(policy_losses, config=config.policy) if plus else answer_losses
    step = StepPrograms(
        made,
        is_trained(config),
        partial(losses, remat=config.remat, attention=config.attention),
        METRICS if plus else SFT_METRICS,
        optimizer(config.optim, updates),
        learning_rate(config.optim, updates),
        seed=config.seed,
        mesh=mesh,
        dropout=any(linear.adapter is not None and linear.adapter.dropout > 0 for _, linear in adapted(made)),
    )
    roller = Roller(vlm.engine, config.masks, config.seed)
    assert vlm.folder is not None, "it was loaded"
    weights = weights_digest(vlm.folder, without=(GLIMPSE_TENSORS, GLIMPSE_TORCH))
    return PlusRun(config, vlm, mesh, feed, validation, roller, step, steps, identity(config, feed, steps, weights))


def trained(model: LVLM, config: PlusConfig, mesh: Mesh | None) -> LVLM:
    """The model with what is trained: an adapter, or some of its parameters in float32."""
    if config.adapter_from is None and any(adapted(model)):
        raise GlimpseError(f"model={config.model} has an adapter already; merge it first: gp-jax merge {config.model} --to DIR")
    if config.adapter is not None and config.adapter_from is None:
        attach(model, config.adapter, seed=config.seed)
    wanted = is_trained(config)
    chosen = [(path, v) for path, v in nnx.to_flat_state(nnx.state(model)) if wanted(path, v)]
    if not chosen:
        raise GlimpseError(
            f"parameters: {', '.join(config.parameters)} names no parameter, such as {next(iter(flat_params(nnx.state(model))))}"
        )

    def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        sharding = parameter_sharding(".".join(map(str, path)), variable.shape, mesh, model.config.text)
        value = variable[...].astype(jnp.float32)
        return variable.replace(value if value.sharding == sharding else put(value, sharding))

    nnx.update(model, nnx.from_flat_state([(path, place(path, variable)) for path, variable in chosen]))
    return model


def is_trained(config: PlusConfig) -> Any:
    """nnx filter: whether a parameter is trained."""

    def chosen(path: tuple, _: object = None) -> bool:
        if config.adapts:
            return "adapter" in path
        return any(fnmatchcase(".".join(map(str, path)), pattern) for pattern in config.parameters)

    return chosen


def build_questions(config: PlusConfig, sources: Sequence[DataSource], maker: SampleMaker, progress: Progress) -> Feed:
    """Opens the sources, measures their records and plans the steps."""
    opened, lengths = measured(config, sources, maker, progress)
    schedule = Schedule(
        sources,
        lengths,
        batch=config.batch_size,
        shapes=config.data.shapes,
        window=maker.config.vision.window_side**2,
        seed=config.data.seed,
    )
    return Feed(opened, schedule, LoadQuestions(opened, maker, schedule), config.data, config.accumulation)


def ladders_of(buckets: Sequence[Shape], unit: int, config: PlusConfig) -> Ladders:
    """The lengths of the records, so that few programs are needed. buckets: of all feeds; unit: patches of a visual token."""
    prompts = sorted({bucket.prompt for bucket in buckets})
    answers = max(bucket.tail for bucket in buckets) if config.stage == "sft" else config.policy.max_new_tokens
    return Ladders(
        patches=Ladder("patches", tuple(sorted({max(1, bucket.slots) * unit for bucket in buckets}))),
        prompt=Ladder("prompt", tuple(prompts)),
        kept=octaves("kept", min(LEAST_ROWS, prompts[-1]), prompts[-1], parts=1, multiple=16),
        decode=Ladder("decode", (answers,)),
        batch=Ladder("batch", tuple(config.batch_size * count for count in doublings(config.accumulation))),
    )


def doublings(last: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    return sorted({*(1 << power for power in range(last.bit_length())), last})


def identity(config: PlusConfig, feed: Feed, steps: int, weights: str) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from: all that changes its numbers; not the devices it runs on."""
    left_out = ("mesh", "out", "data", "remat", "attention", "compilation_cache")
    chosen = {
        name: value for name, value in plain(config).items() if name not in left_out and not name.endswith("_every") and name != "keep"
    }
    if config.stage == "sft":
        for name in ("policy", "rewards"):
            chosen.pop(name, None)
    return chosen | {"weights": weights, "data": records_identity(config, feed), "steps": steps}


def describe_plus(run: PlusRun) -> str:
    """Describes a run in a few lines."""
    config, size = run.config, sum(leaf.size for leaf in jax.tree.leaves(run.step.params))
    each = f" x {config.policy.group_size} completions" if config.stage == "plus" else ""
    lines = [f"{run.feed.schedule.samples} records; prompts of {', '.join(map(str, run.roller.engine.ladders.prompt.rungs))} rows at most"]
    lines += [f"left out of training: {run.feed.left_out()}"] if run.feed.left_out() else []
    lines.append(
        f"{run.steps} steps of {config.batch_size} x {config.accumulation} questions{each}, {size / 1e6:.2f} M trainable parameters, "
        f"{jax.device_count()} device(s) in {jax.process_count()} process(es)"
    )
    return "\n".join(lines)
