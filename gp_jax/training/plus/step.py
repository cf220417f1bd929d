"""One step of the stages `plus` and `sft`: questions, masks, rollouts, rewards, advantages, updates; and a validation."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from gp_jax.errors import GlimpseError
from gp_jax.runtime.clock import COMPILES
from gp_jax.runtime.disk import path_of
from gp_jax.training.build import Progress
from gp_jax.training.checkpoint import run_folder
from gp_jax.training.plus.advantages import Advantages, advantages, token_weights
from gp_jax.training.plus.batches import Weighted, micro_batch
from gp_jax.training.plus.questions import LoadedQuestions, Together, in_steps, steps_in, together
from gp_jax.training.plus.rollouts import Rollout, joined
from gp_jax.training.plus.run import PlusRun
from gp_jax.training.plus.samples import Samples
from gp_jax.training.plus.settings import terms_of
from gp_jax.training.plus.summary import facts
from gp_jax.training.rewards.functions import Completion
from gp_jax.training.rewards.rewarding import Rewarded, Rewards, Stopped, check_missing
from gp_jax.training.run_log import RunLog
from gp_jax.training.step import Counts, Gathered, TrainState
from gp_jax.trees import Array

Phase = Callable[[str], None]
VERDICTS = "verdicts.jsonl"


class PlusStep:
    """Takes the steps of a run."""

    def __init__(self, run: PlusRun, tell: Callable[[str], None]):
        self.run, self.config, self.folder = run, run.config, run_folder(run.config.out)
        self.samples: Samples | None = None
        self.rewards: list[Rewards] = []
        if run.config.stage == "plus" and jax.process_index() == 0:
            cache = path_of(run.config.rewards.judge.cache or str(self.folder / VERDICTS))
            for sources in (run.config.data.sources, run.config.data.validation):
                self.rewards.append(Rewards(run.config.rewards, [terms_of(source.rewards) for source in sources], cache, tell))

    def __call__(
        self,
        state: TrainState,
        gathered: Gathered,
        step: int,
        batches: Iterator[LoadedQuestions],
        phase: Phase,
        stopped: Callable[[], bool],
    ) -> tuple[TrainState, Gathered, dict[str, Any]] | None:
        """One step. Returns: the new state and metrics; None when `stopped` ended it, with nothing changed."""
        compiled, start = COMPILES.count, time.perf_counter()
        groups = together([next(batches) for _ in range(self.config.accumulation)])
        if not groups:
            raise GlimpseError(f"none of the records of step {step + 1} can be read")
        if self.config.stage == "sft":
            return self._supervised(state, gathered, step, groups, phase)
        phase("rollouts")
        policy, roller = self.config.policy, self.run.roller
        roller.update(nnx.to_pure_dict(state.params))
        rollouts = [roller.answer(own.questions, roller.draw_masks(own.questions, step), step, policy, policy.group_size) for own in groups]
        whole = joined(rollouts)
        rolled = time.perf_counter()
        phase("rewards")
        try:
            texts, rewarded = self.reward(whole, 0, stopped)
        except Stopped:
            return None
        check_missing(rewarded, self.config.rewards.most_missing)
        rated = time.perf_counter()
        places = [place // policy.group_size for place in range(len(texts))]
        found = advantages([r.total for r in rewarded], places, whole.cut, policy)
        phase("update")
        state, gathered, metrics = self.updates(state, gathered, rollouts, found, groups)
        jax.block_until_ready(metrics)
        if self.config.samples_every and step % self.config.samples_every == 0:
            self.write(step, whole, texts, rewarded, found)
        spent = {"rollout_s": rolled - start, "reward_s": rated - rolled, "update_s": time.perf_counter() - rated}
        generated = sum(map(len, whole.tokens))
        spent |= {"rollout_tokens_per_s": generated / spent["rollout_s"], "compilations": float(COMPILES.count - compiled)}
        names = [source.path for source in self.config.data.sources]
        return state, gathered, metrics | facts(whole, rewarded, found, names, self.config) | spent

    def updates(
        self, state: TrainState, gathered: Gathered, rollouts: Sequence[Rollout], found: Advantages, groups: Sequence[Together]
    ) -> tuple[TrainState, Gathered, dict[str, Any]]:
        """Updates with the completions of a step; nothing is updated where none of them counts."""
        policy, step, slots = self.config.policy, self.run.step, self.run.slots
        valid = np.arange(slots) < np.array([len(tokens) for own in rollouts for tokens in own.tokens])[:, None]
        weight, size, group = token_weights(valid, found.counted, policy), self.config.batch_size, policy.group_size
        start, chosen, measured = 0, [], 0
        for rollout, own in zip(rollouts, groups, strict=True):
            part = slice(start, start + len(rollout.tokens))
            counted = np.asarray(found.counted[part].reshape(-1, group).any(axis=1))
            for members in without_idle(own.parts, counted, size):
                chosen.append((rollout, members, Weighted(found.values[part], weight[part])))
                measured += sum(len(rollout.tokens[place * group + turn]) for place in members for turn in range(group))
            start = part.stop
        if not chosen:  # every step is measured
            chosen = [(rollouts[0], groups[0].parts[0][:size] or [0], Weighted(found.values, weight))]
            measured = sum(len(tokens) for tokens in rollouts[0].tokens[: len(chosen[0][1]) * group])
        counts = Counts(np.float32(max(1, measured)), np.float32(max(1, found.counted.sum())))
        built = [micro_batch(self.run.roller.engine, rollout, members, size, slots, weighted) for rollout, members, weighted in chosen]
        if policy.num_iterations > 1:
            built = [dataclasses.replace(batch, old=step.evaluate(state, batch, counts)[1]) for batch in built]
        first: dict[str, Any] = {}
        metrics: dict[str, Any] = {}
        for _ in range(policy.num_iterations):
            for batch in built:
                gathered = step.accumulate(gathered, state, batch, counts)
            if not found.counted.any():
                return state, clear(gathered), jax.tree.map(np.asarray, gathered.sums) | self.idle()
            state, gathered, metrics = step.update(state, gathered)
            first = first or metrics
        gap = {name: value for name, value in first.items() if name.endswith("rollout_gap")}
        return state, gathered, metrics | gap | {"skipped": 0.0}

    def idle(self) -> dict[str, float]:
        """Metrics of an update that was left out."""
        return {"grad_norm": 0.0, "update_norm": 0.0, "learning_rate": 0.0, "bad": -1, "skipped": 1.0}

    def reward(self, rollout: Rollout, sources: int, stopped: Callable[[], bool]) -> tuple[list[str], list[Rewarded]]:
        """Texts and rewards of completions. The first process makes them for all. sources: 0: of training, 1: of validation.

        Raises: Stopped; GlimpseError."""
        group, limit = len(rollout.tokens) // max(1, len(rollout.questions)), self.config.policy.max_new_tokens
        texts = [self.run.vlm.processor.text(tokens) for tokens in rollout.tokens]
        if not self.rewards:
            return texts, shared(None, len(texts))
        asked = []
        for place, (text, tokens) in enumerate(zip(texts, rollout.tokens, strict=True)):
            question = rollout.questions[place // group]
            record, data = question.record, (self.config.data.sources, self.config.data.validation)[sources]
            suffix = data[question.source].suffix
            asked.append(
                Completion(
                    question=f"{record.question}\n{suffix}" if suffix else record.question,
                    answer=record.answer,
                    text=text,
                    tokens=tuple(map(int, tokens)),
                    cut=rollout.cut[place],
                    limit=limit,
                    source=question.source,
                    id=record.id,
                    dataset=record.dataset,
                    boxes=tuple(box for boxes in record.boxes for box in boxes),
                )
            )
        return texts, shared(self.rewards[sources](asked, stopped), len(texts))

    def write(self, step: int, rollout: Rollout, texts: Sequence[str], rewarded: Sequence[Rewarded], found: Advantages) -> None:
        """Adds to the samples of the run."""
        if self.samples is None:
            self.samples = Samples(self.folder, step)
        self.samples.add(step, rollout, texts, rewarded, found.values, self.run.vlm.processor)

    def _supervised(
        self, state: TrainState, gathered: Gathered, step: int, groups: Sequence[Together], phase: Phase
    ) -> tuple[TrainState, Gathered, dict[str, Any]]:
        phase("update")
        built, counts, kept = self.answers(groups, step)
        for batch in built:
            gathered = self.run.step.accumulate(gathered, state, batch, counts)
        state, gathered, metrics = self.run.step.update(state, gathered)
        return state, gathered, metrics | {"retention": kept}

    def answers(self, groups: Sequence[Together], step: int) -> tuple[list[Any], Counts, float]:
        """Micro-batches of the records' own answers under their masks, and the share of the visual tokens that is kept."""
        roller, slots, built, kept = self.run.roller, self.run.slots, [], []
        every = [question.sample.answer for own in groups for question in own.questions]
        total = sum(answer.size for answer in every)
        for own in groups:
            masks, tokens = roller.draw_masks(own.questions, step), [question.sample.answer for question in own.questions]
            batch, nothing = roller.batch(own.questions, masks), [np.zeros(answer.size) for answer in tokens]
            rollout = Rollout(own.questions, masks, batch, roller.engine.view(batch), tokens, nothing, [False] * len(tokens))
            valid = np.arange(slots) < np.array([answer.size for answer in tokens])[:, None]
            weighted = Weighted(np.ones(len(tokens), np.float32), (valid / total).astype(np.float32))
            built += [micro_batch(roller.engine, rollout, part, self.config.batch_size, slots, weighted) for part in own.parts if part]
            kept += masks
        return built, Counts(np.float32(total), np.float32(len(every))), kept_share(kept)

    def validate(
        self, state: TrainState, step: int, folder: epath.Path, log: RunLog, progress: Progress, stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Greedy answers to the validation records and their rewards; in the stage sft the loss of the records' answers.

        Returns: means; None when `stopped` ended it early.
        """
        feed = self.run.validation
        assert feed is not None, "there are records to validate on"
        self.run.roller.update(nnx.to_pure_dict(state.params))
        totals: dict[str, list[float]] = {}
        for groups in progress(in_steps(feed), "validating", steps_in(feed)):
            if stopped():
                return None
            count = sum(len(own.questions) for own in groups)
            if self.config.stage == "sft":
                built, counts, kept = self.answers(groups, 0)
                loss = sum(float(self.run.step.evaluate(state, batch, counts)[0]["loss"]) for batch in built)
                found = {"loss": [loss] * count, "retention": [kept] * count}
            else:
                greedy = dataclasses.replace(self.config.policy, temperature=0.0, top_k=0, top_p=1.0)
                roller = self.run.roller
                rollout = joined([roller.answer(own.questions, roller.draw_masks(own.questions, 0), 0, greedy, 1) for own in groups])
                try:
                    _, rewarded = self.reward(rollout, 1, stopped)
                except Stopped:
                    return None
                rewards = [r.total for r in rewarded if r.total is not None]
                found = {"reward": rewards, "loss": [-r for r in rewards], "cut": list(map(float, rollout.cut))}
                found["retention"] = [float(mask.mean()) for mask in rollout.masks if mask.size]
            for name, values in found.items():
                totals.setdefault(name, []).extend(values)
        means = {name: float(np.mean(values)) if values else math.nan for name, values in totals.items()}
        log.write(step, means, "validation")
        return means


def without_idle(parts: Sequence[Sequence[int]], counted: np.ndarray, size: int) -> list[list[int]]:
    """Micro-batches of the questions that count, as few as hold them: the others would add nothing to gradients. counted: by question."""
    left = [place for members in parts for place in members if counted[place]]
    return [left[start : start + size] for start in range(0, len(left), size)]


def kept_share(masks: Sequence[np.ndarray]) -> float:
    """Mean share of the visual tokens that masks keep."""
    return float(np.mean([mask.mean() for mask in masks if mask.size] or [1.0]))


def clear(gathered: Gathered) -> Gathered:
    """The same with zeros."""
    return jax.tree.map(lambda x: x * 0, gathered)


def shared(rewarded: list[Rewarded] | None, count: int) -> list[Rewarded]:
    """The first process's rewards in every process. rewarded: None in the others."""
    if jax.process_count() == 1:
        assert rewarded is not None, "this process made them"
        return rewarded
    totals: Array = np.full(count, np.nan) if rewarded is None else [np.nan if r.total is None else r.total for r in rewarded]
    totals = multihost_utils.broadcast_one_to_all(np.asarray(totals, np.float32))
    if rewarded is None:
        return [Rewarded(None if math.isnan(total) else float(total), {}, "missing") for total in totals]
    return [dataclasses.replace(r, total=None if r.total is None else float(total)) for r, total in zip(rewarded, totals, strict=True)]
