"""The benchmark: record number i of a split, the same on every machine; and scenes with several questions for the stage `base`."""

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gp_jax.config.choices import check_choice
from gp_jax.data.record import Entry, Record
from gp_jax.errors import GlimpseError
from gp_jax.runtime.progress import Progress
from gp_jax.scenes.draw import draw
from gp_jax.scenes.labels import Labels, labels
from gp_jax.scenes.palette import held_out
from gp_jax.scenes.questions import FAMILIES, Draft, Question, asks, pick, pick_one
from gp_jax.scenes.scene import TOKEN, make_scene
from gp_jax.scenes.things import Scene

SPLIT_SEED = {"train": 101, "val": 202, "test": 303, "test_ood": 404}
PACKED_SEED = 505
UNSEEN = "test_ood"
DATASET = "scenes"


@functools.cache
def _canvases(low: int, high: int) -> tuple[tuple[int, int], ...]:
    """Picture sizes (width, height) in pixels with low to high visual tokens: sides of at least 96 px, none more than twice the other."""
    sides = range(6, 35)
    return tuple((TOKEN * w, TOKEN * h) for w in sides for h in sides if low <= w * h <= high and w <= 2 * h and h <= 2 * w)


USUAL, ANY, LARGE = _canvases(240, 272), _canvases(64, 400), _canvases(400, 576)


def canvas_of(rng: np.random.Generator, split: str, tokens: tuple[int, int] | None = None) -> tuple[int, int]:
    """Draws width and height in pixels: about 256 visual tokens for 60 % of the records, else 64 to 400; in test_ood 400 to 576.

    Args: tokens: least and most visual tokens, instead.
    """
    if tokens is not None:
        sizes = _canvases(*tokens)
        return sizes[int(rng.integers(len(sizes)))]
    if split == UNSEEN:
        return LARGE[int(rng.integers(len(LARGE)))]
    if (lot := rng.random()) < 0.3:
        return 256, 256
    sizes = USUAL if lot < 0.6 else ANY
    return sizes[int(rng.integers(len(sizes)))]


def scene_question(split: str, index: int, seed: int = 0, tokens: tuple[int, int] | None = None) -> tuple[Scene, Question]:
    """Scene and question of record number `index`; nothing is drawn.

    Args: seed: another seed gives another benchmark of the same kind; tokens: least and most visual tokens, None: see `canvas_of`.
    Raises: GlimpseError for an unknown split.
    """
    if split not in SPLIT_SEED:
        raise GlimpseError(f"split '{split}' is not one of {', '.join(SPLIT_SEED)}")
    rng = np.random.default_rng(np.random.SeedSequence([SPLIT_SEED[split], index, *([seed] if seed else [])]))
    canvas, family = canvas_of(rng, split, tokens), FAMILIES[index % len(FAMILIES)]
    while True:
        scene = make_scene(rng, canvas, unseen=split == UNSEEN)
        pile = [ask for ask in asks(scene) if ask.family == family and (split != UNSEEN or _is_unseen(scene, ask))]
        if pile:
            return scene, pick_one(scene, rng, pile)


def _is_unseen(scene: Scene, ask: Draft) -> bool:
    """Whether what is asked for has a held-out pair of color and shape, or the question's family has no such pairs."""
    if ask.family in ("text", "chart"):
        return True
    return any(thing.is_named and held_out(thing.color, thing.kind) for thing in (scene.things[i] for i in ask.target))


def scene_record(split: str, index: int, seed: int = 0, tokens: tuple[int, int] | None = None) -> Record:
    """Record number `index`: one question, of family `index % 6`, about one picture."""
    scene, question = scene_question(split, index, seed, tokens)
    width, height = scene.canvas
    file = io.BytesIO()
    Image.fromarray(draw(scene)).save(file, "BMP")  # the noise hardly compresses: PNG would halve the bytes, but take most of the time
    boxes = tuple((x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in question.boxes)
    return Record(record_id(split, index, seed, tokens), DATASET, question.question, question.answer, (file.getvalue(),), (boxes,), (None,))


def scene_entry(split: str, index: int, seed: int = 0, tokens: tuple[int, int] | None = None) -> Entry:
    """The entry of `scene_record`; nothing is drawn."""
    scene, question = scene_question(split, index, seed, tokens)
    return Entry(record_id(split, index, seed, tokens), DATASET, question.question, question.answer, (scene.canvas,))


def record_id(split: str, index: int, seed: int = 0, tokens: tuple[int, int] | None = None) -> str:
    """A record's id, such as test-000012; with seed 7 test-s7-000012, with 64 to 99 visual tokens test-t64to99-000012."""
    other = (f"s{seed}-" if seed else "") + (f"t{tokens[0]}to{tokens[1]}-" if tokens else "")
    return f"{split}-{other}{index:06d}"


def families(record: Record | Entry) -> str:
    """The family of a record's question, from the number in its id."""
    return FAMILIES[int(record.id.rsplit("-", 1)[1]) % len(FAMILIES)]


class ScenesSource:
    """Records of a split, made when they are read: a `record.Source` and a grain `RandomAccessDataSource`. Pickles as its settings."""

    def __init__(
        self,
        split: str,
        count: int,
        start: int = 0,
        progress: bool = False,
        seed: int = 0,
        only: Sequence[str] = FAMILIES,
        tokens: tuple[int, int] | None = None,
    ) -> None:
        """Record `i` is number `start + i` of the split, counting only records of the families `only`. Raises: GlimpseError."""
        if split not in SPLIT_SEED:
            raise GlimpseError(f"split '{split}' is not one of {', '.join(SPLIT_SEED)}")
        for family in only:
            check_choice("family", family, FAMILIES)
        if count < 1 or start < 0 or seed < 0:
            raise GlimpseError(f"scenes {start} to {start + count}, seed {seed}: count must be 1 or more, start and seed 0 or more")
        self.split, self.count, self.start, self.seed, self._progress = split, count, start, seed, progress
        if tokens is not None and not _canvases(*tokens):
            raise GlimpseError(f"no canvas has {tokens[0]} to {tokens[1]} visual tokens (36 to 1,156 are possible)")
        self.only, self.tokens = tuple(family for family in FAMILIES if family in only), tokens

    def __getstate__(self) -> dict:
        return {name: vars(self)[name] for name in ("split", "count", "start", "seed", "only", "tokens", "_progress")}

    def __repr__(self) -> str:
        more = (f", only={self.only}" if self.only != FAMILIES else "") + (f", tokens={self.tokens}" if self.tokens else "")
        return f"ScenesSource({self.split!r}, {self.count}, {self.start}, seed={self.seed}{more})"

    def _number(self, index: int) -> int:
        """The number in the split of record `index`; the families alternate in the split."""
        turn, place = divmod(self.start + index, len(self.only))
        return turn * len(FAMILIES) + FAMILIES.index(self.only[place])

    @property
    def name(self) -> str:
        """How messages call this source."""
        return f"scenes ({self.split})"

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """One entry per record, in order; each takes about a millisecond, once."""
        numbers = [self._number(i) for i in range(self.count)]
        bar = Progress(numbers, desc=self.name, unit="scene", disable=not self._progress)
        return [scene_entry(self.split, i, self.seed, self.tokens) for i in bar]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        index = index.__index__()
        if not -self.count <= index < self.count:
            raise IndexError(f"{self.name}: record {index} of {self.count}")
        return scene_record(self.split, self._number(index % self.count), self.seed, self.tokens)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(self.count))


@dataclass(frozen=True)
class PackedScene:
    """One picture and several questions about it."""

    image: np.ndarray  # (height, width, 3) uint8
    questions: list[Question]
    labels: Labels


def packed_scene(seed: int, index: int, canvas: tuple[int, int] = (256, 256), count: int = 8, relations: float = 0.0) -> PackedScene:
    """Scene number `index` of an endless stream, without held-out pairs.

    Args: canvas: (width, height) in pixels; count: most questions; relations: least share of them that are relations.
    """
    rng = np.random.default_rng(np.random.SeedSequence([PACKED_SEED, seed, index]))
    scene = make_scene(rng, canvas)
    return PackedScene(draw(scene), pick(scene, rng, count, relations), labels(scene))
