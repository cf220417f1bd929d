"""Answers a task's records under every plan, resumably."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gp_jax.buckets import Ladder, Ladders
from gp_jax.data.masks import box_mask, picture_mask
from gp_jax.data.prepared import open_prepared
from gp_jax.data.record import Entry, Record, Source
from gp_jax.data.samples import decode
from gp_jax.evaluation.metrics import exact_match, iou, recall
from gp_jax.evaluation.plans import EvalPlan, shrunk_grid
from gp_jax.evaluation.results import Prediction, read_predictions, write_predictions
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.flops import Workload, stages
from gp_jax.results import Answer
from gp_jax.scenes.source import DATASET, ScenesSource, families
from gp_jax.vlm import GlimpseVLM

SMALL_LADDERS = Ladders(  # for pictures of a few hundred visual tokens: little padding, few programs
    patches=Ladder("patches", (512, 1024, 1280, 1792, 2560, 4096, 8192)),
    prompt=Ladder("prompt", (160, 288, 352, 480, 672, 1088, 2112)),
    kept=Ladder("kept", (48, 64, 96, 160, 288, 480, 1088)),
    decode=Ladder("decode", (16, 32, 64, 128, 256, 512)),
)


@dataclass(frozen=True)
class Task:
    """Records by name. One picture each."""

    name: str
    source: Source
    suffix: str = ""
    max_new_tokens: int = 24

    @cached_property
    def entries(self) -> list[Entry]:
        """What is known of the records without their pictures."""
        return self.source.entries

    def family(self, number: int) -> str:
        """Kind of question, for the breakdown."""
        entry = self.entries[number]
        return families(entry) if entry.dataset == DATASET else entry.dataset


def open_task(name: str, config: EvalConfig) -> Task:
    """scenes, scenes:SPLIT, or a prepared folder. Raises: GlimpseError that names what is wrong with it."""
    path, colon, split = name.rpartition(":") if ":" in name and not name.endswith(":") else (name, "", "")
    path, split = (path, split) if colon and "/" not in split else (name, "")
    options = dict(suffix=config.suffix, max_new_tokens=config.max_new_tokens)
    if path == "scenes":
        return Task(name, ScenesSource(split or "test", config.limit, config.start), **options)
    source = open_prepared(path, split or "test")
    return Task(name, First(source, config.limit), **options)


class First:
    """The first records of a source."""

    def __init__(self, source: Source, count: int):
        self.source, self.name, self.entries = source, source.name, source.entries[:count]

    def __getitem__(self, index: int) -> Record:
        return self.source[index]


def reference_masks(record: Record, grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Visual tokens that hold the evidence, per picture (rows, columns) bool."""
    parts = zip(record.boxes, record.masks, grids, strict=True)
    return [box_mask(boxes, grid) if mask is None else picture_mask(mask, grid) for boxes, mask, grid in parts]


class Runner:
    """One model, one task, one file of predictions."""

    def __init__(self, vlm: GlimpseVLM, task: Task, path: Path, batch: int = 8):
        self.vlm, self.task, self.path, self.batch = vlm, task, path, batch

    def run(self, plans: Sequence[EvalPlan], quiet: bool | None = None) -> list[Prediction]:
        """Answers what is not answered yet. Returns: all predictions of these plans, plan by plan in task order."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for plan in plans:
            done = {p.sample for p in self.saved() if p.plan == plan.name}
            left = [n for n in self.order() if self.task.entries[n].id not in done]
            with tqdm(total=len(self.task.entries), initial=len(done), desc=plan.name, unit="answer", disable=quiet) as bar:
                write_predictions(self.path, self.answers(plan, left, bar))
        number = {entry.id: i for i, entry in enumerate(self.task.entries)}
        saved = [p for p in self.saved() if p.sample in number]
        return [p for plan in plans for p in sorted((p for p in saved if p.plan == plan.name), key=lambda p: number[p.sample])]

    def saved(self) -> list[Prediction]:
        """Predictions of this task so far."""
        return [p for p in read_predictions(self.path) if p.task == self.task.name] if self.path.exists() else []

    def order(self) -> list[int]:
        """Record numbers, equal sizes together: batches need little padding."""
        sizes = [max((self.vlm.processor.grid(*size) for size in entry.sizes), default=(0, 0)) for entry in self.task.entries]
        return sorted(range(len(sizes)), key=lambda n: (sizes[n][0] * sizes[n][1], n))

    def answers(self, plan: EvalPlan, numbers: Sequence[int], bar: tqdm) -> Iterator[Prediction]:
        """Predictions, batch by batch."""
        ratio, processor = self.matched_retention() if plan.matched else plan.ratio, self.vlm.processor
        for start in range(0, len(numbers), self.batch):
            part = numbers[start : start + self.batch]
            records = [self.task.source[n] for n in part]
            whole = [[processor.grid(*size) for size in self.task.entries[n].sizes] for n in part]
            masks = [reference_masks(record, own) for record, own in zip(records, whole, strict=True)]
            questions = [f"{r.question}\n{self.task.suffix}" if self.task.suffix else r.question for r in records]
            pictures = [[decode(image, record.id) for image in record.images] for record in records]
            if plan.shrink:
                small = [[shrunk_grid(grid, ratio) for grid in own] for own in whole]
                pictures = [[processor.fitted(p, g) for p, g in zip(own, to, strict=True)] for own, to in zip(pictures, small, strict=True)]
            options = dict(prune=plan.rule(masks, ratio), max_new_tokens=self.task.max_new_tokens)
            answers = self.vlm.answer(pictures, questions, **options)
            for n, record, answer, own, sizes in zip(part, records, answers, masks, whole, strict=True):
                bar.update()
                yield self.prediction(plan, n, record, answer, own, sum(rows * columns for rows, columns in sizes), len(part))

    def matched_retention(self) -> float:
        """The share of visual tokens that the plan `glimpse` keeps, over all samples."""
        done = [p for p in self.saved() if p.plan == "glimpse"]
        return max(sum(p.kept for p in done) / max(1, sum(p.total for p in done)), 1e-6)

    def prediction(
        self, plan: EvalPlan, number: int, record: Record, answer: Answer, masks: list[np.ndarray], total: int, batch: int
    ) -> Prediction:
        """What is written down of an answer. total: visual tokens of the picture as it came."""
        keep = np.concatenate([k.reshape(-1) for k in answer.keep]) if answer.keep else np.zeros(0, bool)
        reference = np.concatenate([m.reshape(-1) for m in masks]) if masks else np.zeros(0, bool)
        evidence = {"recall": recall(keep, reference), "iou": iou(keep, reference)} if plan.prunes else {}
        return Prediction(
            task=self.task.name,
            sample=record.id,
            plan=plan.name,
            question=record.question,
            answer=record.answer,
            prediction=answer.text,
            family=self.task.family(number),
            kept=answer.kept,
            total=total,
            prefill_retention=float(np.mean(answer.seen)) / total if total else 1.0,
            metrics={"exact_match": exact_match(answer.text, record.answer)} | evidence,
            boxes=tuple(box for boxes in record.boxes for box in boxes),
            grid=tuple(answer.keep[0].shape) if answer.keep else (0, 0),
            keep=tuple(np.flatnonzero(keep).tolist()),
            tokens=len(answer.tokens),
            seconds={stage: seconds / batch for stage, seconds in answer.timings.items()},
            cuts=answer.cuts,
            cached=float(np.mean(answer.cached)),
        )

    def flops(self, prediction: Prediction) -> float:
        """Of one answer without padding, answers taken as long as the reference: what the plan itself saves. What scorers without
        training compute is not counted; it is less than a layer."""
        config, processor = self.vlm.config, self.vlm.processor
        text = len(processor.tokenizer(processor.chat(1, prediction.question))["input_ids"]) - 1
        work = Workload.of(config.vision, [prediction.grid], text, len(processor.tokenizer(prediction.answer)["input_ids"]) + 1)
        cuts = [(after, min(1.0, (kept + 0.5) / max(1, work.visual))) for after, kept in prediction.cuts]  # half: rounded down there
        glimpse = self.vlm.glimpse_config if prediction.plan.startswith("glimpse") else None
        cuts = cuts or ([(glimpse.reduce_layer, 1.0)] if glimpse else [])  # a glimpse that keeps all has still been taken
        return float(stages(config, glimpse, work, cuts, itemsize=4, past=prediction.held == prediction.kept)["total"].flops)
