"""Questions with exactly one right answer, and the things in the picture that are its evidence.

A question is asked only if picture and words allow one answer: names are unique, orders are clear, and nothing outside the boxes is
needed. `docs/scenes.md` explains the rules.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gp_jax.scenes.palette import COLORS, FILLS
from gp_jax.scenes.stencils import shape_area
from gp_jax.scenes.things import DIRECTIONS, Box, Scene, Thing, neighbors

FAMILIES = ("attribute", "relation", "text", "chart", "comparison", "detail")
YES_SHARE = 0.8  # share of yes where both answers are possible; where only no is, the question is asked half as often
APART = 12  # least distance in pixels of two centres that are called left and right of each other
PHRASES = {
    "kind": ("describe the {}.", "what does the {} look like?"),
    "fill": ("what is the {} object?", "name the {} object."),
    "color": ("what does the {} shape look like?", "describe the {} shape."),
    "side": ("what is directly {} the {}?", "which shape is directly {} the {}?", "name the shape directly {} the {}."),
    "number": ("what number is on the {} tag?", "read the {} tag.", "which number does the {} tag show?"),
    "bars": ("list the bars from {} to {}.", "name the bars from {} to {}."),
    "above": ("which bars are {} than the {} bar, from left to right?", "list the bars {} than the {} bar from left to right."),
    "larger": ("which is larger, the {} or the {}?", "which shape is larger, the {} or the {}?"),
    "same": ("do the {} and the {} have the same color?", "are the {} and the {} of the same color?"),
    "tags": ("which tag has the larger number, the {} one or the {} one?", "which number is larger, the {} one or the {} one?"),
    "row": ("name the {} shapes from left to right.", "list the {} shapes from left to right."),
    "tiny": ("what is the tiny object?", "name the tiny object."),
    "tinies": ("name the tiny objects from left to right.", "list the tiny objects from left to right."),
}
PHRASES["different"] = PHRASES["same"]  # the same question with the answer no; a topic of its own because yes is rare
LARGER = 1.2  # least ratio of two areas of which one is called larger
# Topics that name a shape by one word. A tag and a bar are rectangles of one color and a chart has a white square as its panel: if there is
# a red tag or bar, no question says "the red shape"; if there is a chart, none says "the square", "the white shape" or "the white square".
LOOSE = ("kind", "color", "larger", "same", "different", "row")
SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question in words. things: their numbers in the scene, in the order of question or answer; boxes: the boxes of these things."""

    family: str
    question: str
    answer: str
    boxes: tuple[Box, ...]
    things: tuple[int, ...]
    topic: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A question before it is put into words. target: the things that are asked for, without an anchor that only locates them."""

    family: str
    topic: str
    words: tuple[str, ...]
    answer: str
    things: tuple[int, ...]
    target: tuple[int, ...]

    def phrase(self, scene: Scene, number: int = 0) -> Question:
        """The question in one of its phrasings."""
        question = PHRASES[self.topic][number].format(*self.words)
        boxes = tuple(scene.things[i].box for i in self.things)
        return Question(self.family, question, self.answer, boxes, self.things, self.topic)


def questions(scene: Scene) -> list[Question]:
    """All questions about a scene, in their first phrasing."""
    return [ask.phrase(scene) for ask in asks(scene)]


def pick(scene: Scene, rng: np.random.Generator, count: int, relations: float = 0.0) -> list[Question]:
    """Up to `count` different questions, spread evenly over the families, in random phrasing and order.

    Args: relations: share of the questions that is taken from the relations first, if there are enough.
    """
    piles: dict[str, list[Draft]] = {}
    for ask in asks(scene):
        piles.setdefault(ask.family, []).append(ask)
    first = min(round(relations * count), len(piles.get("relation", ())))
    picked = [pick_one(scene, rng, piles["relation"]) for _ in range(first)]
    order = [list(piles)[i] for i in rng.permutation(len(piles)).tolist() if piles[list(piles)[i]]]
    while order and len(picked) < count:
        for family in order[: count - len(picked)]:
            picked.append(pick_one(scene, rng, piles[family]))
        order = [family for family in order if piles[family]]
    return [picked[i] for i in rng.permutation(len(picked)).tolist()]


def pick_one(scene: Scene, rng: np.random.Generator, pile: list[Draft]) -> Question:
    """Takes one question of a family off the pile: first a topic, all equally likely, then a question of the topic."""
    topics = list(dict.fromkeys(ask.topic for ask in pile))
    mixed = "same" in topics and "different" in topics
    if mixed or ("different" in topics and len(topics) > 1 and rng.random() < 0.5):
        topics.remove("different")
    topic = topics[int(rng.integers(len(topics)))]
    if mixed and topic == "same" and rng.random() > YES_SHARE:
        topic = "different"
    members = [i for i, ask in enumerate(pile) if ask.topic == topic]
    ask = pile.pop(members[int(rng.integers(len(members)))])
    return ask.phrase(scene, int(rng.integers(len(PHRASES[topic]))))


def asks(scene: Scene) -> list[Draft]:
    """All questions about a scene, not yet in words."""
    named = [(i, thing) for i, thing in enumerate(scene.things) if thing.is_named]
    found = [*_attribute(named), *_relation(scene, named), *_comparison(named), *_detail(named)]
    for i, thing in enumerate(scene.things):
        if thing.group == "tag":
            found.append(Draft("text", "number", (thing.color_word,), thing.number, (i,), (i,)))
        elif thing.group == "chart":
            found += [Draft("chart", topic, words, answer, (i,), (i,)) for topic, words, answer in _chart(thing)]
    others = {thing.color_word for thing in scene.things if thing.group == "tag"}
    for chart in (thing for thing in scene.things if thing.group == "chart"):
        others |= {"square", "white", *(COLORS[bar.color] for bar in chart.bars)}
        found = [ask for ask in found if "white square" not in ask.words]
    return [ask for ask in found if not (ask.topic in LOOSE and others & set(ask.words))] + list(_tags(scene))


Named = list[tuple[int, Thing]]


def _attribute(named: Named) -> Iterator[Draft]:
    kinds, colors = Counter(thing.kind for _, thing in named), Counter(thing.color for _, thing in named)
    fills = Counter(thing.fill for _, thing in named if thing.group == "shape")
    for i, thing in named:
        if thing.group != "shape":
            continue
        color, kind, fill = thing.color_word, thing.kind_word, thing.fill_word
        if kinds[thing.kind] == 1:
            yield Draft("attribute", "kind", (kind,), f"{fill} {color}", (i,), (i,))
        if thing.fill and fills[thing.fill] == 1:  # not for plain things: "the plain object" could be a tag
            yield Draft("attribute", "fill", (FILLS[thing.fill],), f"{color} {kind}", (i,), (i,))
        if colors[thing.color] == 1:
            yield Draft("attribute", "color", (color,), f"{fill} {kind}", (i,), (i,))


def _relation(scene: Scene, named: Named) -> Iterator[Draft]:
    pairs = Counter((thing.color, thing.kind) for _, thing in named)
    for i, thing in named:  # not for tiny things: that would be a question of the family detail as well
        if thing.group == "shape" and pairs[thing.color, thing.kind] == 1:
            for direction, j in zip(DIRECTIONS, neighbors(scene.things, thing), strict=True):
                if j is not None:
                    words = (SIDES[direction], f"{thing.color_word} {thing.kind_word}")
                    yield Draft("relation", "side", words, _name(scene.things[j]), (i, j), (j,))


def _chart(chart: Thing) -> Iterator[tuple[str, tuple[str, ...], str]]:
    words = {bar: COLORS[bar.color] for bar in chart.bars}
    ranked = sorted(chart.bars, key=lambda bar: -bar.height)
    yield "bars", ("tallest", "shortest"), ", ".join(words[bar] for bar in ranked)
    yield "bars", ("shortest", "tallest"), ", ".join(words[bar] for bar in reversed(ranked))
    for bar in chart.bars:
        taller = [words[other] for other in chart.bars if other.height > bar.height]
        shorter = [words[other] for other in chart.bars if other.height < bar.height]
        for word, others in (("taller", taller), ("shorter", shorter)):
            if len(others) > 1:
                yield "above", (word, words[bar]), ", ".join(others)


def _comparison(named: Named) -> Iterator[Draft]:
    kinds = Counter(thing.kind for _, thing in named)
    unique = [(i, thing) for i, thing in named if thing.group == "shape" and kinds[thing.kind] == 1]
    for (i, one), (j, other) in itertools.permutations(unique, 2):
        words = (one.kind_word, other.kind_word)
        small, large = sorted((one, other), key=_area)
        if small.large < large.large and _area(large) >= LARGER * _area(small):
            yield Draft("comparison", "larger", words, f"the {_name(large)}", (i, j), (i, j))
        if one.color == other.color:
            yield Draft("comparison", "same", words, f"yes, both are {one.color_word}", (i, j), (i, j))
        else:
            yield Draft("comparison", "different", words, f"no, {one.color_word} and {other.color_word}", (i, j), (i, j))
    by_color: dict[int, Named] = {}
    for i, thing in named:
        by_color.setdefault(thing.color, []).append((i, thing))
    for color, members in by_color.items():
        # If one of them were tiny, "shapes" would be ambiguous.
        if 2 <= len(members) <= 3 and all(thing.group == "shape" for _, thing in members) and (row := _in_order(members)):
            numbers = tuple(i for i, _ in row)
            yield Draft("comparison", "row", (COLORS[color],), ", ".join(thing.kind_word for _, thing in row), numbers, numbers)


def _tags(scene: Scene) -> Iterator[Draft]:
    tags = [(i, thing) for i, thing in enumerate(scene.things) if thing.group == "tag"]
    for (i, one), (j, other) in itertools.permutations(tags, 2):
        larger = one if int(one.number) > int(other.number) else other
        answer = f"the {larger.color_word} tag with {larger.number}"
        yield Draft("comparison", "tags", (one.color_word, other.color_word), answer, (i, j), (i, j))


def _detail(named: Named) -> Iterator[Draft]:
    tiny = [(i, thing) for i, thing in named if thing.group == "tiny"]
    if len(tiny) in (1, 2) and (row := _in_order(tiny)):
        numbers = tuple(i for i, _ in row)
        yield Draft("detail", "tiny" if len(row) == 1 else "tinies", (), ", ".join(_name(thing) for _, thing in row), numbers, numbers)


def _in_order(members: Named) -> Named | None:
    """The members from left to right; None if two of them are too close to be ordered."""
    row = sorted(members, key=lambda member: member[1].centre[0])
    close = any(b.centre[0] - a.centre[0] < APART for (_, a), (_, b) in itertools.pairwise(row))
    return None if close else row


def _area(thing: Thing) -> float:
    """Area of a thing in pixels."""
    return shape_area(thing.kind, thing.box[2] - thing.box[0])


def _name(thing: Thing) -> str:
    return f"{thing.color_word} {thing.kind_word}"
