"""Answers a task's records under every plan, resumably, by one process or several.

Batches are the same for any number of processes: records in the order of their sizes, so many at a time. Process p of P answers every
P-th batch and appends to a file of its own in the same folder; what any of them has answered before is not answered again, unless
the question behind the same id is another one now, or the retention that a plan has to match.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from gp_jax.data.masks import evidence
from gp_jax.data.record import Record
from gp_jax.data.samples import question_text
from gp_jax.errors import GlimpseError
from gp_jax.evaluation.memory import Peak
from gp_jax.evaluation.metrics import iou, recall
from gp_jax.evaluation.plans import EvalPlan, matching_ratio, shrunk_grid
from gp_jax.evaluation.results import Prediction, merge_predictions, part_path, read_parts, write_predictions
from gp_jax.evaluation.tasks import Task
from gp_jax.flops import Workload, stages
from gp_jax.images import decode
from gp_jax.results import Answer
from gp_jax.sharding import wait_for_all
from gp_jax.vlm import GlimpseVLM


class Runner:
    """One model, one task, one file of predictions."""

    def __init__(self, vlm: GlimpseVLM, task: Task, path: Path, batch: int = 8):
        self.vlm, self.task, self.path, self.batch = vlm, task, path, batch
        self.number = {entry.id: number for number, entry in enumerate(task.entries)}
        self.broken: dict[str, str] = {}  # records whose pictures this process could not open, and why

    def run(self, plans: Sequence[EvalPlan], quiet: bool | None = None) -> list[Prediction]:
        """Answers what is not answered yet. Returns: all predictions of these plans, plan by plan in task order.

        With several processes everybody gets everybody's.
        """
        own, here, count = part_path(self.path, jax.process_index()), jax.process_index(), jax.process_count()
        own.parent.mkdir(parents=True, exist_ok=True)
        quiet, names, ratios = True if here else quiet, {plan.name for plan in plans}, {}
        if changed := sum(p.plan in names and not self.current(p) for p in self.of_task()):
            self.say(f"{changed} saved answers are not used: questions, reference answers or pictures of these ids are others now")
        wait_for_all(f"{self.task.name}: counted")
        for plan in plans:
            if plan.matched:
                wait_for_all(f"{self.task.name}: others before {plan.name}")
            ratio = ratios[plan.name] = self.matched_ratio(plan) if plan.matched else None
            saved = [p for p in self.saved() if p.plan == plan.name]
            done = {p.sample for p in saved if not plan.matched or p.ratio == ratio}
            if again := len(saved) - len(done):
                self.say(f"{again} saved answers of '{plan.name}' are not used: what matches the glimpse is a share of {ratio:.2%} now")
            share = [[n for n in part if self.task.entries[n].id not in done] for part in self.batches()[here::count]]
            left = sum(map(len, share))
            with tqdm(total=left + len(done), initial=len(done), desc=plan.name, unit="answer", disable=quiet) as bar:
                write_predictions(own, self.answers(plan, ratio if plan.matched else plan.ratio, share, bar))
        wait_for_all(f"{self.task.name}: done")
        found = {plan.name: {} for plan in plans}
        for p in self.saved():
            if p.plan in names and ratios[p.plan] in (None, p.ratio):
                found[p.plan][p.sample] = self.scored(p)
        return [own[entry.id] for own in found.values() for entry in self.task.entries if entry.id in own]

    def say(self, line: str) -> None:
        """A line from the first process."""
        if jax.process_index() == 0:
            tqdm.write(f"{self.task.name}: {line}")

    def merge(self) -> None:
        """One file of all processes' predictions, when nobody answers any more."""
        if jax.process_index() == 0:
            merge_predictions(self.path)

    def saved(self) -> list[Prediction]:
        """Predictions of this task's records so far, of all processes."""
        return [p for p in self.of_task() if self.current(p)]

    def of_task(self) -> list[Prediction]:
        """Predictions under the ids of this task's records, whatever was asked then."""
        return [p for p in read_parts(self.path) if p.task == self.task.name and p.sample in self.number]

    def current(self, prediction: Prediction) -> bool:
        """Whether the record of that id still is what was asked: rows without an id of their own are called by their place in a file."""
        entry = self.task.entries[self.number[prediction.sample]]
        same = (prediction.question.strip(), prediction.answer.strip()) == (entry.question.strip(), entry.answer.strip())
        return same and prediction.sizes in ((), tuple(tuple(size) for size in entry.sizes))

    def scored(self, prediction: Prediction) -> Prediction:
        """With the task's metrics, whichever those were when it was answered."""
        kept = {name: value for name, value in prediction.metrics.items() if name in ("recall", "iou")}
        metrics = self.task.score(self.number[prediction.sample], prediction.prediction) | kept
        return Prediction(**{**vars(prediction), "metrics": metrics})

    def batches(self) -> list[list[int]]:
        """Record numbers, equal sizes together: batches need little padding."""
        plots = [[self.vlm.processor.plot(*size) for size in entry.sizes] for entry in self.task.entries]
        sizes = [max((grid for plot in own for grid in plot.grids), default=(0, 0)) for own in plots]
        order = sorted(range(len(sizes)), key=lambda n: (sizes[n][0] * sizes[n][1], n))
        return [order[start : start + self.batch] for start in range(0, len(order), self.batch)]

    def load(self, number: int) -> tuple[Record, list[Image.Image]]:
        """A record and its pictures. Raises: GlimpseError when one of them is broken."""
        record = self.task.source[number]
        return record, [decode(image, f"picture {i + 1}") for i, image in enumerate(record.images)]

    def left_out(self, predictions: Sequence[Prediction]) -> Mapping[str, str]:
        """Why, per record that has not been asked about: rows that cannot be read, and pictures that cannot, of all processes."""
        answered = {p.sample for p in predictions}
        for number, entry in enumerate(self.task.entries):
            if entry.id not in answered and entry.id not in self.broken:
                try:
                    self.load(number)
                except GlimpseError as error:
                    self.broken[entry.id] = str(error)
        return {**self.task.left_out, **self.broken}

    def loaded(self, part: Sequence[int]) -> Iterator[tuple[int, Record, list[Image.Image]]]:
        """Those of a batch that can be opened; others are named and left out."""
        for n in part:
            name = self.task.entries[n].id
            if name in self.broken:
                continue
            try:
                yield n, *self.load(n)
            except GlimpseError as error:
                self.broken[name] = str(error)
                tqdm.write(f"{self.task.name}: {name} is left out: {error}")

    def answers(self, plan: EvalPlan, ratio: float | None, parts: Sequence[Sequence[int]], bar: tqdm) -> Iterator[Prediction]:
        """Predictions, batch by batch. ratio: what is to be kept, for plans that are told."""
        self.memory, processor = Peak(), self.vlm.processor
        for part in parts:
            if not (found := list(self.loaded(part))):
                continue
            records = [record for _, record, _ in found]
            whole = [[grid for picture in pictures for grid in processor.plot(*picture.size).grids] for _, _, pictures in found]
            masks = [evidence(record, [picture.size for picture in pictures], processor) for _, record, pictures in found]
            given = [own if any(m.any() for m in own) else [np.ones_like(m) for m in own] for own in masks]  # without evidence: all
            questions = [question_text(record.question, self.task.suffix) for record in records]
            pictures = [own for _, _, own in found]
            if plan.shrink:
                small = [[shrunk_grid(grid, ratio) for grid in own] for own in whole]
                pictures = [[processor.fitted(p, g) for p, g in zip(own, to, strict=True)] for own, to in zip(pictures, small, strict=True)]
            options = dict(prune=plan.rule(given, ratio), max_new_tokens=self.task.max_new_tokens)
            answers = self.vlm.answer(pictures, questions, **options)
            for (n, record, _), answer, own, sizes in zip(found, answers, masks, whole, strict=True):
                bar.update()
                total = sum(rows * columns for rows, columns in sizes)
                yield self.prediction(plan, ratio, n, record, answer, own, total, len(found))

    def matched_ratio(self, plan: EvalPlan) -> float:
        """With which a plan keeps as many visual tokens as the plan `glimpse`, over all samples."""
        done = [p for p in self.saved() if p.plan == "glimpse"]
        return matching_ratio([(p.grid, *p.more_grids) for p in done], sum(p.kept for p in done), plan.shrink)

    def prediction(
        self, plan: EvalPlan, ratio: float | None, number: int, record: Record, answer: Answer, masks: list, total: int, batch: int
    ) -> Prediction:
        """What is written down of an answer. masks: (rows, columns) bool each. total: visual tokens of the picture as it came."""
        keep = np.concatenate([k.reshape(-1) for k in answer.keep]) if answer.keep else np.zeros(0, bool)
        reference = np.concatenate([m.reshape(-1) for m in masks]) if masks else np.zeros(0, bool)
        covered = {"recall": recall(keep, reference), "iou": iou(keep, reference)} if plan.prunes else {}
        return Prediction(
            task=self.task.name,
            sample=self.task.entries[number].id,
            plan=plan.name,
            question=record.question,
            answer=record.answer,
            prediction=answer.text,
            family=self.task.family(number),
            kept=answer.kept,
            total=total,
            prefill_retention=float(np.mean(answer.seen)) / total if total else 1.0,
            metrics=self.task.score(number, answer.text) | covered,
            boxes=record.boxes[0] if record.boxes else (),
            grid=tuple(answer.keep[0].shape) if answer.keep else (0, 0),
            more_grids=tuple(tuple(keep.shape) for keep in answer.keep[1:]),
            keep=tuple(np.flatnonzero(keep).tolist()),
            tokens=len(answer.tokens),
            seconds={stage: seconds / batch for stage, seconds in answer.timings.items()},
            cuts=answer.cuts,
            cached=float(np.mean(answer.cached)),
            ratio=ratio,
            sizes=tuple(tuple(size) for size in self.task.entries[number].sizes),
            peak=self.memory.bytes(),
        )

    def flops(self, prediction: Prediction) -> float:
        """Of one answer without padding, answers taken as long as the reference: what the plan itself saves. What scorers without
        training compute is not counted; it is less than a layer."""
        config, processor = self.vlm.config, self.vlm.processor
        grids = [prediction.grid, *prediction.more_grids]
        plots = [processor.plot(*size) for size in self.task.entries[self.number[prediction.sample]].sizes]
        prompt = processor.chat(len(plots), question_text(prediction.question, self.task.suffix))
        breaks = sum(int((plot.rows < 0).sum()) for plot in plots)
        text = len(processor.tokenize([prompt])[0]) - len(plots) + breaks
        work = Workload.of(config.vision, grids, text, len(processor.tokenize([prediction.answer], prompts=False)[0]) + 1)
        cuts = [(after, min(1.0, (kept + 0.5) / max(1, work.visual))) for after, kept in prediction.cuts]  # half: rounded down there
        glimpse = self.vlm.glimpse_config if prediction.plan.startswith("glimpse") else None
        cuts = cuts or ([(glimpse.reduce_layer, 1.0)] if glimpse else [])  # a glimpse that keeps all has still been taken
        return float(stages(config, glimpse, work, cuts, itemsize=4, past=prediction.held == prediction.kept)["total"].flops)
