"""Draws the scenes of a micro-batch when it is needed: its number decides pictures, turns and hidden tokens, equally on every host."""

from collections.abc import Sequence
from dataclasses import replace

import grain
import numpy as np

from gp_jax.data.collate import Shape
from gp_jax.data.feed import LoadedBatch
from gp_jax.processing.qwen import Processor
from gp_jax.scenes.questions import Question
from gp_jax.scenes.settings import Canvas, ScenesConfig
from gp_jax.scenes.source import PackedScene, packed_scene
from gp_jax.scenes.turns import Hiding, TurnMaker, evidence, packed_batch

BLACK_QUESTIONS = 2  # turns about a picture that is black except for their evidence
RETENTION = ((0.0, 0.0), (0.0, 0.1), (0.0, 0.5), (0.5, 0.9))  # ranges for the share of visual tokens without evidence that a cut keeps


def canvas_of(number: int, end: int, config: ScenesConfig) -> Canvas:
    """The size of a micro-batch's pictures. end: micro-batches of the run."""
    late = min(1.0, number / max(1.0, config.settled * end))
    weights = np.array([(1 - late) * canvas.early + late * canvas.late for canvas in config.canvases])
    random = np.random.default_rng((config.seed, 1, number))
    return config.canvases[random.choice(len(weights), p=weights / weights.sum())]


def tail_rows(canvas: Canvas, config: ScenesConfig) -> int:
    """Number of text rows for the turns of a picture, a multiple of 16."""
    return -(-canvas.questions * config.turn_rows // 16) * 16


def hide(scene: PackedScene, random: np.random.Generator, config: ScenesConfig, depth: int, side: int) -> Hiding:
    """The visual tokens that are hidden from a picture's turns: none, or random ones without evidence. side: pixels of a visual token."""
    height, width = scene.image.shape[:2]
    grid = (height // side, width // side)
    masks = np.array([evidence(question, width, height, grid) for question in scene.questions], bool).reshape(-1, grid[0] * grid[1])
    whole = np.ones(masks.shape[1], bool)
    if random.random() < config.anchored:
        return Hiding(np.array([~asked_for(question, width, height, grid) for question in scene.questions], bool), whole, 0)
    if random.random() >= config.pruned:
        return Hiding(np.ones_like(masks), whole, depth)

    def others(shape: tuple[int, ...]) -> np.ndarray:
        return random.random(shape) < random.uniform(*RETENTION[random.integers(len(RETENTION))])

    keep = np.array([mask | others(mask.shape) for mask in masks])
    seen = np.any(masks, axis=0) | others(masks.shape[1:])
    return Hiding(keep, seen, int(random.integers(config.first_cut, depth)))


def asked_for(question: Question, width: int, height: int, grid: tuple[int, int]) -> np.ndarray:
    """Visual tokens of the answer of a relation that its anchor does not touch; none for other questions. Returns: (N,) bool."""
    if question.family != "relation":
        return np.zeros(grid[0] * grid[1], bool)
    anchor, answer = (evidence(replace(question, boxes=(box,)), width, height, grid) for box in question.boxes)
    return answer & ~anchor


def blacken(scene: PackedScene, side: int) -> tuple[PackedScene, np.ndarray]:
    """Blackens everything except the evidence of the first turns. Returns: the scene, and the visual tokens that have no known labels any
    more, (rows, columns) bool."""
    height, width = scene.image.shape[:2]
    asked = scene.questions[:BLACK_QUESTIONS]
    left = np.zeros((height, width), bool)
    for question in asked:
        for x1, y1, x2, y2 in question.boxes:
            left[int(np.floor(y1)) : int(np.ceil(y2)), int(np.floor(x1)) : int(np.ceil(x2))] = True
    whole = np.all(left.reshape(height // side, side, width // side, side), axis=(1, 3))
    return PackedScene(np.where(left[..., None], scene.image, 0).astype(np.uint8), asked, scene.labels), ~whole


class LoadScenes(grain.transforms.Map):
    """Draws and pads a micro-batch; runs in background threads."""

    def __init__(self, config: ScenesConfig, processor: Processor, rows: Sequence[int], batch: int, end: int):
        """Args: rows: rows of the global batch that this process holds; batch: pictures of a micro-batch; end: micro-batches of the run."""
        self.config, self.rows, self.batch, self.end = config, tuple(rows), batch, end
        self.maker, vision = TurnMaker(processor), processor.config.vision
        self.side = vision.patch_shape[-1] * vision.spatial_merge_size  # pixels of a visual token

    def map(self, number: int) -> LoadedBatch:
        config, side, depth = self.config, self.side, self.maker.config.text.num_hidden_layers
        canvas = canvas_of(number, self.end, config)
        scenes, hidings, unknown = [], [], []
        for row in self.rows:
            index = number * self.batch + row
            random = np.random.default_rng((config.seed, 2, index))
            scene = packed_scene(config.seed, index, (canvas.width, canvas.height), canvas.questions, config.relations)
            hidden = np.zeros((canvas.height // side, canvas.width // side), bool)
            if random.random() < config.blackened:
                scene, hidden = blacken(scene, side)
            scenes.append(scene)
            unknown.append(hidden)
            hidings.append(hide(scene, random, config, depth, side))
        batch = packed_batch(scenes, hidings, self.maker, canvas.questions, tail_rows(canvas, config), unknown)
        shape = Shape(batch.vision.token_image.shape[1], batch.prompt.ids.shape[1], batch.turns.ids.shape[1])
        return LoadedBatch(number, shape, batch, self.rows)
