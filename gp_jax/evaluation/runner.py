"""Answers a task's records under every plan, resumably, by one process or several.

Batches are the same for any number of processes: records in the order of their sizes, `batch` at a time. Process p of P answers every
P-th batch and appends to a file of its own in the same folder; what any of them has answered before is not answered again, unless
the question behind the same id is another one now, or the retention that a plan has to match.

Plans are timed alike: all of them answer a batch before the next batch begins, each time another plan first. A pass in which programs
were made (traced, compiled, read from disk) is not timed: the batch is asked again.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL.Image import Image

from gp_jax.data.samples import question_text
from gp_jax.errors import GlimpseError, reason
from gp_jax.evaluation.matching import pooled_ratio, sample_ratio
from gp_jax.evaluation.memory import Peak
from gp_jax.evaluation.metrics import iou, recall
from gp_jax.evaluation.plans import POOLED, EvalPlan
from gp_jax.evaluation.results import Prediction, Saved, merge_predictions, part_path, write_predictions
from gp_jax.evaluation.samples import LoadedRecord, Samples
from gp_jax.evaluation.tasks import Task
from gp_jax.flops import Workload, first_look, stages
from gp_jax.inference.requests import resolve
from gp_jax.inference.results import Answer
from gp_jax.processing.views import shrunk_grid
from gp_jax.pruning.rule import Prune
from gp_jax.runtime.clock import COMPILE
from gp_jax.runtime.progress import Progress
from gp_jax.sharding import wait_for_all
from gp_jax.vlm import GlimpseVLM

GIVE_UP = 10  # unexpected errors of a plan one after the other: no fault of the questions
GLIMPSE = "glimpse"  # the plan that others match
LOOKING = (GLIMPSE, "look")  # plans whose names begin so cut where the glimpse does
ANY = 0.5  # a retention, where its number does not matter
PASSES = 3  # over a batch, until one makes no program


def in_turn(plans: Sequence[EvalPlan], turn: int) -> list[EvalPlan]:
    """Plans in the order in which they answer batch number `turn`: another one first each time, those that match the glimpse last."""
    groups = [[plan for plan in plans if bool(plan.matched) is matched] for matched in (False, True)]
    return [plan for own in groups if own for plan in own[turn % len(own) :] + own[: turn % len(own)]]


class Runner:
    """One model, one task, one file of predictions."""

    def __init__(self, vlm: GlimpseVLM, task: Task, path: Path, batch: int = 8, saved: Saved | None = None):
        """Args: saved: of this path, shared by the runners of several tasks, so that the file is read once."""
        self.vlm, self.task, self.path, self.batch = vlm, task, path, batch
        self.samples, self._saved = Samples(vlm.processor, task), saved or Saved(path)
        self._unexpected: Counter[str] = Counter()  # by plan
        self._measured, self._memory = "", Peak()  # the plan whose turn it is, and the memory since then

    def run(self, plans: Sequence[EvalPlan], quiet: bool | None = None) -> list[Prediction]:
        """Answers what is not answered yet. Returns: all predictions of these plans, plan by plan in task order, of the samples that all
        of them answered.

        With several processes everybody gets everybody's. Raises: GlimpseError for a plan or a length that no sample can be answered with.
        """
        for plan in plans:
            resolve(plan.rule((), ANY), self.vlm.glimpse_config, self.vlm.config.text.num_hidden_layers)
        self.vlm.engine.ladders.decode.fit(self.task.max_new_tokens)
        own, names = part_path(self.path, jax.process_index()), {plan.name for plan in plans}
        own.parent.mkdir(parents=True, exist_ok=True)
        if changed := sum(p.plan in names and not self.current(p) for p in self.of_task()):
            self.samples.say(f"{changed} saved answers are not used: questions, reference answers or pictures of these ids are others now")
        wait_for_all(f"{self.task.name}: counted")
        pooled = [plan for plan in plans if plan.matched == POOLED]  # these need what the glimpse keeps of all samples
        for name, together in (("one by one", [plan for plan in plans if plan not in pooled]), ("pooled", pooled)):
            if together:
                write_predictions(own, self.answers(together, True if jax.process_index() else quiet))
            wait_for_all(f"{self.task.name}: {name}")
        found = {plan.name: self.matching(plan) for plan in plans}
        whole = [entry.id for entry in self.task.entries if all(entry.id in own for own in found.values())]
        return [self.scored(own[name]) for own in found.values() for name in whole]

    def merge(self) -> None:
        """One file of all processes' predictions, when nobody answers any more."""
        if jax.process_index() == 0:
            merge_predictions(self.path)

    def saved(self, plan: str) -> list[Prediction]:
        """A plan's predictions of this task's records so far, of all processes."""
        return [p for p in self.of_task() if p.plan == plan and self.current(p)]

    def of_task(self) -> list[Prediction]:
        """Predictions under the ids of this task's records, whatever was asked then."""
        return [p for p in self._saved.read() if p.task == self.task.name and p.sample in self.samples.number]

    def current(self, prediction: Prediction) -> bool:
        """As of `Samples`, and a glimpse cuts where it does."""
        glimpse, layers = self.vlm.glimpse_config, [after for after, _ in prediction.cuts]
        strange = prediction.plan.startswith(LOOKING) and glimpse and layers not in ([], [glimpse.reduce_layer])
        return not strange and self.samples.current(prediction)

    def scored(self, prediction: Prediction) -> Prediction:
        """With the task's metrics, whichever those were when it was answered."""
        kept = {name: value for name, value in prediction.metrics.items() if name in ("recall", "iou")}
        metrics = self.task.score(self.samples.number[prediction.sample], prediction.prediction) | kept
        return Prediction(**{**vars(prediction), "metrics": metrics})

    def left_out(self, predictions: Sequence[Prediction]) -> Mapping[str, str]:
        """Why, per row or record that not every plan answered, of all processes."""
        return self.samples.unanswered(predictions)

    def matching(self, plan: EvalPlan) -> dict[str, Prediction]:
        """A plan's saved predictions by id, those that keep as many visual tokens as the glimpse if the plan has to."""
        told = self.ratios(plan, self.saved(GLIMPSE)) if plan.matched else None
        return {p.sample: p for p in self.saved(plan.name) if told is None or told.get(p.sample) == p.ratio}

    def ratios(self, plan: EvalPlan, glimpse: Sequence[Prediction]) -> dict[str, float]:
        """By id, the share with which a plan that matches the glimpse keeps as many visual tokens as it kept of a sample, or of all.

        glimpse: its predictions, of all samples for a plan that is pooled.
        """
        kept = {p.sample: p.kept for p in glimpse}
        grids = {name: self.samples.grids[self.samples.number[name]] or () for name in kept}
        if plan.matched == POOLED:
            return dict.fromkeys(kept, pooled_ratio(list(grids.values()), sum(kept.values()), plan.shrink))
        return {name: sample_ratio(grids[name], count, plan.shrink) for name, count in kept.items()}

    def answers(self, plans: Sequence[EvalPlan], quiet: bool | None) -> Iterator[Prediction]:
        """What this process has to answer, batch by batch, in each of them plan by plan."""
        glimpse = {p.sample: p for p in self.saved(GLIMPSE)}
        done = {plan.name: set(self.matching(plan)) for plan in plans}
        before = {plan.name: {p.sample: p.ratio for p in self.saved(plan.name)} for plan in plans}
        for plan in plans:
            if plan.matched == "sample":  # whether these match is known when the glimpse has answered
                done[plan.name] |= before[plan.name].keys() - glimpse.keys()
            if again := len(self.saved(plan.name)) - len(done[plan.name]):
                self.samples.say(f"{again} saved answers of '{plan.name}' are not used: the glimpse to match keeps another number now")
        pooled = {plan.name: self.ratios(plan, list(glimpse.values())) for plan in plans if plan.matched == POOLED}
        names = [entry.id for entry in self.task.entries]
        share = self.samples.batches(self.batch)[jax.process_index() :: jax.process_count()]
        left, kept = sum(names[n] not in own for part in share for n in part for own in done.values()), sum(map(len, done.values()))
        with Progress(total=left + kept, initial=kept, desc=self.task.name, unit="answer", disable=quiet) as bar:
            for turn, part in enumerate(share):
                loaded = list(self.samples.loaded([n for n in part if any(names[n] not in own for own in done.values())]))
                for plan in in_turn(plans, turn):
                    told = pooled.get(plan.name)
                    if plan.matched == "sample":
                        told = self.ratios(plan, [glimpse[names[n]] for n in part if names[n] in glimpse])
                        done[plan.name] -= {name for name, ratio in told.items() if before[plan.name].get(name, ratio) != ratio}
                    bar.set_postfix_str(plan.name, refresh=False)
                    over = done[plan.name] | self.samples.left_out.keys()
                    group = [one for one in loaded if names[one.number] not in over and (told is None or names[one.number] in told)]
                    ratios = [plan.ratio if told is None else told[names[one.number]] for one in group]
                    for prediction in self.tried(plan, group, ratios) if group else ():
                        if plan.name == GLIMPSE:
                            glimpse[prediction.sample] = prediction
                        yield prediction
                    bar.update(sum(names[n] not in done[plan.name] for n in part))

    def tried(self, plan: EvalPlan, group: Sequence[LoadedRecord], ratios: Sequence[float | None]) -> list[Prediction]:
        """A batch's predictions. If it fails its samples are asked one by one, and those that fail alone are left out.

        Raises: GlimpseError when unexpected errors do not end.
        """
        try:
            found = self.asked(plan, group, ratios)
            self._unexpected[plan.name] = 0
            return found
        except Exception as error:  # no single question may end an evaluation
            if len(group) > 1:
                return [p for one, ratio in zip(group, ratios, strict=True) for p in self.tried(plan, [one], [ratio])]
            self.samples.leave_out(group[0].number, f"plan '{plan.name}': {reason(error)}")
            self._unexpected[plan.name] += not isinstance(error, GlimpseError)
            if self._unexpected[plan.name] >= GIVE_UP:
                raise GlimpseError(f"{GIVE_UP} questions one after the other could not be answered, the last: {reason(error)}") from error
            return []

    def asked(self, plan: EvalPlan, group: Sequence[LoadedRecord], ratios: Sequence[float | None]) -> list[Prediction]:
        """A batch's predictions. ratios: what is to be kept, for plans that are told."""
        pictures, told = [one.pictures for one in group], [ratio for ratio in ratios if ratio is not None]
        if plan.shrink:
            small = [[shrunk_grid(grid, ratio) for grid in one.grids] for one, ratio in zip(group, told, strict=True)]
            fitted = self.vlm.processor.fitted
            pictures = [[fitted(p, g) for p, g in zip(own, to, strict=True)] for own, to in zip(pictures, small, strict=True)]
        rule = plan.rule([one.reference for one in group], told if plan.matched == "sample" else ratios[0])
        if self._measured != plan.name:
            self._measured, self._memory = plan.name, Peak()
        answers, seconds = self.timed(pictures, [one.question for one in group], rule)
        each = zip(group, ratios, answers, strict=True)
        return [self.prediction(plan, ratio, one, answer, seconds) for one, ratio, answer in each]

    def timed(
        self, pictures: Sequence[Sequence[Image]], questions: Sequence[str], rule: Prune | None
    ) -> tuple[list[Answer], dict[str, float]]:
        """A batch's answers and the seconds that each took, per stage, once all programs had been made. "compile": what passes before
        that took more. Without stages when every pass made programs.
        """
        answers: list[Answer] = []
        spent = 0.0
        for _ in range(PASSES):
            found = self.vlm.answer(pictures, questions, prune=rule, max_new_tokens=self.task.max_new_tokens)
            answers = found if isinstance(found, list) else [found]
            seconds = answers[0].timings
            took = sum(seconds.values())
            if not seconds.get(COMPILE):
                seconds = seconds | {COMPILE: max(0.0, spent - took) if spent else 0.0}
                break
            spent += took
        else:
            seconds = {COMPILE: spent}
        return answers, {stage: value / len(questions) for stage, value in seconds.items()}

    def prediction(
        self, plan: EvalPlan, ratio: float | None, one: LoadedRecord, answer: Answer, seconds: Mapping[str, float]
    ) -> Prediction:
        """What is written down of an answer. seconds: of `timed`."""
        number, record, masks = one.number, one.record, one.evidence
        total = sum(rows * columns for rows, columns in one.grids)
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
            more_grids=tuple((keep.shape[0], keep.shape[1]) for keep in answer.keep[1:]),
            keep=tuple(np.flatnonzero(keep).tolist()),
            tokens=len(answer.tokens),
            seconds=dict(seconds),
            cuts=answer.cuts,
            cached=float(np.mean(answer.cached)),
            ratio=ratio,
            sizes=tuple((width, height) for width, height in self.task.entries[number].sizes),
            peak=self._memory.bytes(),
            made_from=self.task.made_from(number),
            windows=() if answer.seen_share == 1 else answer.windows,
            looked=answer.look.grids if answer.look else (),
        )

    def flops(self, prediction: Prediction) -> float:
        """Of one answer without padding, answers taken as long as the reference: what the plan itself saves. What scorers without
        training compute is not counted; it is less than a layer."""
        config, processor = self.vlm.config, self.vlm.processor
        grids = [prediction.grid, *prediction.more_grids]
        answer = prediction.answer.encode("utf-8", "replace").decode()  # half a surrogate has no tokens
        plots = [processor.plot(*size) for size in self.task.entries[self.samples.number[prediction.sample]].sizes]
        prompt = processor.chat(len(plots), question_text(prediction.question, self.task.suffix))
        breaks = sum(int((plot.rows < 0).sum()) for plot in plots)
        text = len(processor.tokenize([prompt])[0]) - len(plots) + breaks
        work = Workload.of(config.vision, grids, text, len(processor.tokenize([answer], prompts=False)[0]) + 1)
        work = work.seeing(config.vision, prediction.windows) if prediction.windows else work
        cuts = [(after, min(1.0, (kept + 0.5) / max(1, work.visual))) for after, kept in prediction.cuts]  # half: rounded down there
        glimpse = self.vlm.glimpse_config if prediction.plan.startswith(LOOKING) else None
        cuts = cuts or ([(glimpse.reduce_layer, 1.0)] if glimpse else [])  # a glimpse that keeps all has still been taken
        looked = 0
        if prediction.looked and glimpse:
            looked = first_look(config, glimpse, Workload.of(config.vision, prediction.looked, text - breaks, 1), itemsize=4).flops
        return float(looked + stages(config, glimpse, work, cuts, itemsize=4, past=prediction.held == prediction.kept)["total"].flops)
