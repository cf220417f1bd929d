"""Builds everything that a run of a configuration needs. Errors in configuration, model or data are found here, before the first step."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.data.feed import LoadMicroBatch, load, local_rows
from gp_jax.data.prepared import PreparedSource, open_prepared
from gp_jax.data.record import Source
from gp_jax.data.samples import LookSizes, SampleMaker
from gp_jax.data.schedule import Length, Schedule
from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.data.tally import say
from gp_jax.errors import GlimpseError, some
from gp_jax.glimpse.predictor import make_predictor
from gp_jax.glimpse.prompt import GlimpsePrompt
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.files import GLIMPSE_TENSORS, GLIMPSE_TORCH, weights_digest
from gp_jax.processing.looks import check_parts
from gp_jax.pruning.plan import middle_layer
from gp_jax.scenes.source import ScenesSource
from gp_jax.sharding import make_mesh, mesh_sizes, replicated, spread
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.settings import GlimpseSettings, TrainConfig
from gp_jax.training.step import Counts, TrainingStep
from gp_jax.vlm import GlimpseVLM

FEW_BAD, BAD_SHARE = 10, 0.01  # unreadable records that a run tolerates: this number, or this share of all
Progress = Callable[..., Iterable]  # (items, their name, their number) -> the items, with a progress bar


def glimpse_config(settings: GlimpseSettings, model: ModelConfig) -> GlimpseConfig:
    """The fields of the released configuration, with defaults for this model. Raises: GlimpseError that names an impossible field."""
    depth, logits = model.text.num_hidden_layers, settings.use_attention_logits
    cut = middle_layer(depth) if settings.reduce_layer is None else settings.reduce_layer
    values = dataclasses.asdict(settings) | {
        "reduce_layer": cut,
        "selected_layers": settings.selected_layers or (cut,),
        "le_layers": tuple(range(depth)) if settings.le_layers is None else settings.le_layers,
        "selected_visual_layers": settings.selected_visual_layers or model.vision.usual_conditions,
        "use_attention_logits": model.vision.usual_logits if logits is None else logits,
        "ori_attn_supervision": False,
    }
    del values["start"]
    return GlimpseConfig(**values).validate(model)


def attach_glimpse(model: LVLM, config: GlimpseConfig, seed: int, mesh: Mesh | None, like: Sequence[int] = ()) -> LVLM:
    """Adds a new glimpse to a base model, with random values that are the same in every process.

    Args: like: token ids; the glimpse rows start as copies of the embeddings of the last `le_length` of them.
    """
    rngs = nnx.Rngs(seed)
    model.glimpse_config = config
    # They are None in a base model: nnx must be told that these attributes now hold parameters.
    model.glimpse = nnx.data(GlimpsePrompt(config, model.config.text, rngs=rngs) if config.rows else None)
    model.predictor = nnx.data(make_predictor(config, model.config, dtype=model.decoder.embed_tokens.dtype, rngs=rngs))
    if like and model.glimpse is not None:
        model.glimpse.imitate(model.decoder.embed(jnp.asarray(like[-config.le_length :])))
    for part in (model.glimpse, model.predictor):
        if part is not None:
            nnx.update(part, spread(nnx.state(part), replicated(mesh)))
    return model


def build_mesh(config: Any) -> Mesh | None:
    """The mesh of a run; None for a single device."""
    if jax.device_count() == 1 and (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) in ((1, -1, 1), (1, 1, 1), (-1, 1, 1)):
        return None
    return make_mesh(*mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, jax.device_count()))


@dataclass(frozen=True)
class Feed:
    """Loads records in the order of a schedule."""

    sources: Sequence[Source]
    schedule: Schedule
    loader: Any  # a grain transformation of a micro-batch's number, with its `maker`
    config: DataConfig
    accumulation: int
    bad: set[str] = dataclasses.field(default_factory=set)  # error messages of records that could not be read

    def load(self, start: int, end: int) -> Iterator[Any]:
        """This process's rows of the micro-batches start .. end-1. Raises: GlimpseError when too many records cannot be read."""
        options = dict(threads=self.config.threads, prefetch=self.config.prefetch, workers=self.config.workers)
        return map(self._note, load(self.loader, start, end, **options))

    def _note(self, loaded: Any) -> Any:
        for reason in loaded.bad:
            if reason not in self.bad:
                self.bad.add(reason)
                say(f"{reason}; it is left out ({len(self.bad)} so far)")
        if len(self.bad) > max(FEW_BAD, self.schedule.samples * BAD_SHARE):
            raise GlimpseError(f"{len(self.bad)} of {self.schedule.samples} records cannot be read, most recently: {loaded.bad[-1]}")
        return loaded

    def left_out(self) -> str:
        """A text that says which records are not used and why; "" when all are used."""
        return "; ".join(
            f"{len(members)} because {reason} ({some(self.sources[s].entries[r].id for s, r in members)})"
            for reason, members in self.schedule.left_out.items()
        )

    def micro_batches(self, step: int) -> range:
        """Numbers of a step's micro-batches."""
        return range(step * self.accumulation, (step + 1) * self.accumulation)

    def counts(self, step: int) -> Counts:
        """The denominators of a step's losses."""
        tokens, samples = self.schedule.counts(self.micro_batches(step))
        return Counts(np.float32(tokens), np.float32(max(1, samples)))

    def sizes(self, step: int) -> tuple[int, int]:
        """Numbers of samples and of tokens in a step, without padding."""
        numbers = self.micro_batches(step)
        return sum(len(self.schedule[n].members) for n in numbers), sum(self.schedule.tokens(n) for n in numbers)

    def epoch(self, step: int) -> float:
        """Number of passes over the data before a step, as a fraction."""
        return step * self.accumulation / self.schedule.epoch_end(1)

    def names(self, numbers: Sequence[int]) -> list[str]:
        """Ids of the records in micro-batches, for messages."""
        return [self.sources[s].entries[r].id for number in numbers for s, r in self.schedule[number].members]


def open_source(source: DataSource) -> Source:
    """Opens a prepared folder or generated scenes, see `DataSource.path`. Raises: GlimpseError."""
    name, _, rest = source.path.partition(":")
    if name != "scenes":
        return open_prepared(source.path, source.split)
    count, *options = rest.split(":")
    if not count.isdecimal() or int(count) == 0:
        raise GlimpseError(f"data source '{source.path}': say how many scenes, e.g. scenes:5000")
    chosen: dict[str, Any] = {}
    for option in options:
        if sizes := re.fullmatch(r"(\d+)-(\d+)", option):
            chosen["tokens"] = int(sizes[1]), int(sizes[2])
        else:
            chosen["only"] = option.split(",")
    return ScenesSource(source.split, int(count), **chosen)


def build_feed(config: TrainConfig, sources: Sequence[DataSource], maker: SampleMaker, mesh: Mesh | None, progress: Progress) -> Feed:
    """Opens the sources, measures their records and plans the batches."""
    opened, lengths = measured(config, sources, maker, progress)
    schedule = Schedule(
        sources,
        lengths,
        batch=config.batch_size,
        shapes=config.data.shapes,
        window=maker.config.vision.window_side**2,
        seed=config.data.seed,
    )
    loader = LoadMicroBatch(opened, maker, schedule, local_rows(mesh, config.batch_size), config.accumulation)
    return Feed(opened, schedule, loader, config.data, config.accumulation)


def measured(
    config: Any, sources: Sequence[DataSource], maker: SampleMaker, progress: Progress
) -> tuple[list[Source], list[list[Length | str]]]:
    """Opens sources and measures their records. config: of any stage with `data`."""
    opened = [open_source(source) for source in sources]
    lengths: list[list[Length | str]] = []
    for source, own in zip(sources, opened, strict=True):
        found = maker.measure(own.entries, source.suffix, lambda items: progress(items, "measuring records"), strict=False)
        lengths.append([fitting(length, config) for length in found])
    return opened, lengths


def fitting(length: Length | str, config: Any) -> Length | str:
    """The length if it is within the limits, else why the record is left out."""
    if isinstance(length, str):
        return length
    for part, most, tokens in (("answer", config.data.max_answer, length.answer), ("prompt", config.data.max_prompt, length.shape.prompt)):
        if most is not None and tokens > most:
            return f"its {part} is longer than data.max_{part}={most} tokens"
    return length


@dataclass(frozen=True)
class Run:
    """Everything that a run needs, before its first step."""

    config: TrainConfig
    vlm: GlimpseVLM
    mesh: Mesh | None
    feed: Feed
    validation: Feed | None
    step: TrainingStep
    steps: int
    identity: dict[str, Any]


def build(config: TrainConfig, progress: Progress) -> Run:
    """Loads the model and plans the data. Raises: GlimpseError that names what is wrong."""
    mesh = build_mesh(config)
    vlm = GlimpseVLM.from_pretrained(config.model, config.glimpse_from, config.dtype, mesh, attention=config.attention, progress=True)
    if vlm.processor.tokenizer is None:
        raise GlimpseError(f"{config.model}: has no tokenizer, which training needs")
    if config.glimpse_from is None:
        like = vlm.processor.tokenizer(vlm.processor.chat(1, "?"))["input_ids"] if config.glimpse.start == "prompt" else ()
        model = attach_glimpse(vlm.model, glimpse_config(config.glimpse, vlm.config), config.seed, mesh, like)
        vlm = vlm.with_model(model)
    glimpse = vlm.glimpse_config
    assert glimpse is not None and vlm.folder is not None, "it was loaded with a glimpse, or has just got one"
    data, looks = config.data, None
    if data.looks:
        check_parts(vlm.config)
        looks = LookSizes(data.looks, data.look_shares, data.look_least, data.seed)
    maker = SampleMaker(vlm.processor, glimpse.rows, data.max_visual_tokens, data.released_boxes, looks)
    feed = build_feed(config, config.data.sources, maker, mesh, progress)
    validation = build_feed(config, config.data.validation, maker, mesh, progress) if config.data.validation else None
    steps = number_of_steps(config, feed.schedule)
    step = TrainingStep(
        vlm.model,
        optimizer(config.optim, steps),
        learning_rate(config.optim, steps),
        config.loss,
        seed=config.seed,
        mesh=mesh,
        remat=config.remat,
        attention=config.attention,
    )
    weights = weights_digest(vlm.folder, without=(GLIMPSE_TENSORS, GLIMPSE_TORCH))
    return Run(config, vlm, mesh, feed, validation, step, steps, identity(config, glimpse, feed, steps, weights))


def number_of_steps(config: Any, schedule: Schedule) -> int:
    """Steps of a run. config: of any stage with `steps`, `epochs` and `accumulation`."""
    if config.steps is not None:
        return config.steps
    whole = math.floor(config.epochs)
    part = config.epochs - whole
    start, end = schedule.epoch_end(whole), schedule.epoch_end(math.ceil(config.epochs))
    return max(1, math.ceil((start + part * (end - start)) / config.accumulation))


def identity(config: TrainConfig, glimpse: GlimpseConfig, feed: Feed, steps: int, weights: str) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from: all that changes its numbers; not the devices it runs on.

    Args: weights: digest of the base model's.
    """
    fields = ("model", "glimpse_from", "loss", "optim", "dtype", "batch_size", "accumulation", "seed")
    chosen = {name: value for name, value in plain(config).items() if name in fields}
    settings = plain(glimpse) | {"start": config.glimpse.start}
    return chosen | {"weights": weights, "glimpse": settings, "data": records_identity(config, feed), "steps": steps}


def records_identity(config: Any, feed: Feed) -> dict[str, Any]:
    """The data of a run as far as they change its numbers."""
    data = plain(config.data)
    for name in ("validation", "own", "workers", "threads", "prefetch"):
        del data[name]
    records = repr([source.entries for source in feed.sources])  # ids, questions, answers, sizes
    data["records"] = {"count": sum(len(s.entries) for s in feed.sources), "digest": hashlib.sha256(records.encode()).hexdigest()[:16]}
    if evidence := [source.made_from for source in feed.sources if isinstance(source, PreparedSource)]:
        data["records"]["evidence"] = evidence
    return data


def plain(value: Any) -> Any:
    """A value with dataclasses and tuples turned into JSON values."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
