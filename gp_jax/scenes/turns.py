"""Makes padded numpy arrays of scenes with several turns each. See `trees.PackedBatch` for the shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from gp_jax.data.masks import box_mask
from gp_jax.errors import GlimpseError
from gp_jax.processing.layout import Sample, prompt_input, read_samples, token_grid, vision_input
from gp_jax.processing.qwen import Processor
from gp_jax.scenes.questions import FAMILIES, Question
from gp_jax.scenes.scene import TOKEN
from gp_jax.scenes.source import PackedScene
from gp_jax.trees import DenseLabels, PackedBatch, TurnsInput


@dataclass(frozen=True)
class Hiding:
    """The visual tokens of one picture that stay visible after a cut."""

    keep: np.ndarray  # (turns, N) bool over visual tokens, in prompt order: visible to each turn
    seen: np.ndarray  # (N,) bool: visible to the rows of the prompt
    cut: int  # first layer after the cut; the number of layers: nothing is cut


class TurnMaker:
    """Makes the tokens of turns, with the chat template."""

    def __init__(self, processor: Processor):
        assert processor.tokenizer is not None, "turns are made of tokens"
        self.processor, self.tokenizer, self.config = processor, processor.tokenizer, processor.config

    @lru_cache(maxsize=65536)  # noqa: B019 -- one maker per run
    def _prompt(self, question: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(self.processor.chat(1, question))["input_ids"])

    @lru_cache(maxsize=65536)  # noqa: B019
    def _answer(self, answer: str) -> tuple[int, ...]:
        return (*self.tokenizer(answer)["input_ids"], self.config.eos_token_ids[0])

    def split(self, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A prompt's tokens up to the end of the picture, and the tokens after it."""
        ids = self._prompt(question)
        end = ids.index(self.config.image_token_id) + 2
        return ids[:end], ids[end:]

    def turn(self, question: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of a question, with the template's tokens around it, and of its answer, with the end-of-turn token."""
        return self.split(question.question)[1], self._answer(question.answer)

    def opening(self, pixels: np.ndarray, grid: np.ndarray) -> Sample:
        """The prompt that all turns share. pixels: (patches, patch_dim); grid: (1, 3) time, rows, columns in patches."""
        ids = np.array(self.split("?")[0])
        count = int(grid.prod()) // self.config.vision.merge_unit
        ids = np.repeat(ids, np.where(ids == self.config.image_token_id, count, 1))
        return read_samples(self.config, ids[None], None, pixels, grid)[0]


def evidence(question: Question, width: int, height: int, grid: tuple[int, int]) -> np.ndarray:
    """The visual tokens that a question's boxes touch. Returns: (N,) bool, in prompt order."""
    shares = [(x1 / width, y1 / height, x2 / width, y2 / height) for x1, y1, x2, y2 in question.boxes]
    return box_mask(shares, grid).reshape(-1)


def packed_batch(
    scenes: Sequence[PackedScene], hidings: Sequence[Hiding], maker: TurnMaker, questions: int, rows: int, unknown: Sequence[np.ndarray]
) -> PackedBatch:
    """A batch of scenes of equal size.

    Args:
        questions: turns per picture, Q; rows: text rows, U; turns that do not fit into the rows are left out.
        unknown: per scene, the visual tokens whose labels are unknown, (rows, columns) bool.
    """
    config, batch = maker.config, len(scenes)
    samples = []
    for scene in scenes:
        pixels, grid = maker.processor.pixels([Image.fromarray(scene.image)])
        samples.append(maker.opening(pixels, grid))
    slots, length = samples[0].slots.size, samples[0].ids.size
    if any(s.slots.size != slots or s.ids.size != length for s in samples):
        raise GlimpseError("scenes of a micro-batch differ in size")
    shape = (batch, rows)
    ids, targets, turn = np.full(shape, config.pad_token_id, np.int32), np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    positions, generated = np.zeros((config.position_axes, *shape), np.int32), np.zeros(shape, bool)
    family, keep = np.full((batch, questions), -1, np.int32), np.ones((batch, questions, slots), bool)
    seen, cut = np.ones((batch, slots), bool), np.zeros(batch, np.int32)
    beside, last = np.full((batch, questions, 4, 2), -1, np.int8), np.zeros((batch, questions), np.int32)
    for b, (scene, sample, hiding) in enumerate(zip(scenes, samples, hidings, strict=True)):
        place, row = sample.slot_of_token, 0
        seen[b, place], cut[b] = hiding.seen, hiding.cut
        for t, question in enumerate(scene.questions[:questions]):
            asked, answer = maker.turn(question)
            size = len(asked) + len(answer)
            if row + size > rows:
                break
            span = slice(row, row + size)
            ids[b, span], turn[b, span] = (*asked, *answer), t
            positions[:, b, span] = sample.next_position + np.arange(size)
            targets[b, row + len(asked) - 1 : row + size - 1] = answer
            generated[b, row + len(asked) : row + size] = True
            family[b, t] = FAMILIES.index(question.family)
            keep[b, t, place] = hiding.keep[t]
            beside[b, t], last[b, t] = anchor_neighbors(scene, question), row + len(asked) - 1
            row += size
    return PackedBatch(
        vision=vision_input(samples, config, batch, slots),
        prompt=prompt_input(samples, config, batch, length, 0),
        turns=TurnsInput(ids, positions, turn, generated, targets, family, keep, seen, cut),
        labels=DenseLabels(*dense_labels(scenes, samples, unknown, slots, config.vision.spatial_merge_size), beside, last),
    )


def dense_labels(
    scenes: Sequence[PackedScene], samples: Sequence[Sample], unknown: Sequence[np.ndarray], slots: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """The labels in the order of vision slots; the patches of a token in row order, as the merger joins them."""
    patch = np.full((len(scenes), slots, side * side, 3), -1, np.int8)
    neighbor = np.full((len(scenes), slots, 4, 2), -1, np.int8)
    for b, (scene, sample, hidden) in enumerate(zip(scenes, samples, unknown, strict=True)):
        rows, columns = sample.grids[0]
        stacked = np.stack([scene.labels.kind, scene.labels.color, scene.labels.fill], axis=-1)
        blocks = stacked.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows, columns, side * side, 3)
        beside = np.moveaxis(scene.labels.neighbor, (2, 3), (0, 1))
        place = token_grid(sample.grids)[:, 1:].T
        known = ~hidden[*place]
        patch[b, sample.slot_of_token[known]] = blocks[*place][known]
        neighbor[b, sample.slot_of_token[known]] = beside[*place][known]
    return patch, neighbor


def anchor_neighbors(scene: PackedScene, question: Question) -> np.ndarray:
    """The neighbours of the shape that a relation names. Returns: (4, 2) kinds and colors; -1 for other questions."""
    if question.family != "relation":
        return np.full((4, 2), -1, np.int8)
    x0, y0, x1, y1 = question.boxes[0]
    return scene.labels.neighbor[:, :, int((y0 + y1) / 2) // TOKEN, int((x0 + x1) / 2) // TOKEN]
