"""Rollouts through the engine of inference: prompt and pictures are read once per question, and a group goes on from the shared prefix.

Q questions of a step, G completions of each, M vision slots.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gp_jax.errors import GlimpseError
from gp_jax.inference.decoding import Rows
from gp_jax.inference.engine import Engine, View
from gp_jax.inference.requests import AUTO, Batch, Pruning, sampling_settings
from gp_jax.models.adapter import adapted, without_adapter
from gp_jax.processing.layout import Sample
from gp_jax.pruning.plan import make_plan, middle_layer
from gp_jax.pruning.rule import Prune
from gp_jax.training.plus.questions import Question
from gp_jax.training.plus.settings import MasksConfig, PolicyConfig

MASK_SEED, SAMPLE_SEED = 1, 2  # what a step's seed is used for


@dataclass(frozen=True)
class Rollout:
    """Questions that were answered together."""

    questions: Sequence[Question]
    masks: list[np.ndarray]  # per question (N,) bool: visual tokens that completions see
    batch: Batch
    view: View | None  # None: no question has a picture
    tokens: list[np.ndarray]  # per completion (c,) int32, the end included; those of a question stand together
    sampled: list[np.ndarray]  # per completion (c,) float32: log-probabilities of its tokens when they were drawn
    cut: list[bool]  # per completion: it was stopped at the limit
    padding: float = 0.0  # share of steps of rows that had ended


class Roller:
    """Answers questions with the policy under masks."""

    def __init__(self, engine: Engine, masks: MasksConfig, seed: int):
        self.engine, self.masks, self.seed = engine, masks, seed
        glimpse, depth = engine.glimpse_config, engine.config.text.num_hidden_layers
        after = masks.after if masks.after is not None else glimpse.reduce_layer if glimpse else middle_layer(depth)
        if masks.kind == "predicted" and glimpse is None:
            raise GlimpseError("masks.kind=predicted needs a glimpse (--glimpse-from)")
        if masks.predicted_share and glimpse is None:
            raise GlimpseError(f"masks.predicted_share={masks.predicted_share} needs a glimpse (--glimpse-from)")
        if masks.kind != "none" and not 0 <= after < depth - 1:
            raise GlimpseError(f"masks.after={after} is not one of the model's {depth} layers with a layer behind it (0..{depth - 2})")
        self.prune = None if masks.kind == "none" else Prune(reference_masks=(), after=after)
        self.plan = () if self.prune is None else make_plan(self.prune, glimpse, depth)
        base = without_adapter(engine.model) if any(adapted(engine.model)) else engine.model
        self.base = Engine(base, engine.ladders, engine.mesh, engine.attention) if glimpse else None

    def draw_masks(self, questions: Sequence[Question], step: int) -> list[np.ndarray]:
        """A mask per question, (N,) bool over its visual tokens: the same for all its completions."""
        if self.prune is None:
            return [np.ones(question.sample.prompt.count, bool) for question in questions]
        predicted = [self.is_predicted(question, step) for question in questions]
        asked = [question.sample.prompt for question, by_glimpse in zip(questions, predicted, strict=True) if by_glimpse]
        found = iter(self.predict(asked) if asked and self.base is not None else [np.ones(prompt.count, bool) for prompt in asked])
        return [next(found) if by_glimpse else q.sample.reference for q, by_glimpse in zip(questions, predicted, strict=True)]

    def is_predicted(self, question: Question, step: int) -> bool:
        """Whether a question gets a predicted mask: by the configured share, or because it has no evidence."""
        if not question.sample.prompt.count:
            return False
        if self.masks.kind == "predicted" or not question.sample.reference.any():
            return True
        lot = np.random.default_rng([self.seed, step, question.number, MASK_SEED]).random()
        return bool(lot < self.masks.predicted_share)

    def predict(self, prompts: Sequence[Sample]) -> list[np.ndarray]:
        """The masks of the frozen base's glimpse, under its own keep rule without a cap."""
        engine = self.base
        assert engine is not None and engine.glimpse_config is not None, "there is a glimpse"
        rule = dataclasses.replace(Prune.from_config(engine.glimpse_config), max_remain_ratio=None)
        pruning = Pruning(make_plan(rule, engine.glimpse_config, engine.config.text.num_hidden_layers), rule)
        scores = engine.fetch(engine.prefill(engine.batch(prompts, pruning), scores_only=True).scores)
        return [scores[-1][1][row, prompt.slot_of_token] for row, prompt in enumerate(prompts)]

    def batch(self, questions: Sequence[Question], masks: Sequence[np.ndarray]) -> Batch:
        """The questions as the engine takes them."""
        prompts = [question.sample.prompt for question in questions]
        if self.prune is None:
            return self.engine.batch(prompts, Pruning((), None))
        rule = dataclasses.replace(self.prune, reference_masks=tuple(masks))
        return self.engine.batch(prompts, Pruning(self.plan, rule))

    def answer(self, questions: Sequence[Question], masks: list[np.ndarray], step: int, policy: PolicyConfig, group: int) -> Rollout:
        """Samples `group` completions of every question. A draw depends on the step, the question's number in it and the completion's,
        not on how questions are batched or devices share them.

        Raises: GlimpseError when logits are not finite.
        """
        engine, batch = self.engine, self.batch(questions, masks)
        view = engine.view(batch)
        prefix = engine.prefix(engine.prefill(batch, view=view))
        rows, count = batch.size * group, len(questions) * group
        seed = int(np.random.default_rng([self.seed, step, SAMPLE_SEED]).integers(2**31 - 1))
        settings = sampling_settings(engine.config, policy.temperature, policy.top_k, policy.top_p, seed, AUTO, rows)
        numbers = [question.number * group + place for question in questions for place in range(group)]
        settings = dataclasses.replace(settings, number=np.array([*numbers, *range(rows - count)], np.int32))
        active = np.arange(rows) < count
        state = Rows.behind(engine, prefix, settings, policy.max_new_tokens, active, logprobs=True)
        for _ in state.run(count, policy.max_new_tokens, stream=False):
            pass
        tokens, lengths, logprobs = state.read("tokens", "step", "logprobs")
        ends = set(settings.eos.tolist()) - {-1}
        answers = [tokens[row, : lengths[row]] for row in range(count)]
        steps = int(lengths[:count].max())
        return Rollout(
            questions=questions,
            masks=masks,
            batch=batch,
            view=view,
            tokens=answers,
            sampled=[logprobs[0][row, : lengths[row]] for row in range(count)],
            cut=[int(answer[-1]) not in ends for answer in answers],
            padding=1 - float(lengths[:count].sum()) / (steps * rows),
        )

    def update(self, params: Mapping[str, Any]) -> None:
        """Takes new parameters of the policy, without compiling."""
        self.engine.update(params)


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts of several buckets one behind the other, without what only one has."""
    lists: dict[str, Any] = {
        name: [value for own in rollouts for value in getattr(own, name)] for name in ("questions", "masks", "tokens", "sampled", "cut")
    }
    weights = [len(own.tokens) for own in rollouts]
    padding = float(np.average([own.padding for own in rollouts], weights=weights))
    return Rollout(**lists, batch=rollouts[0].batch, view=None, padding=padding)
