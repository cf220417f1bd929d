"""Every question has one right answer. It is found here another way: from the words and the list of things, cell by cell."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from gp_jax.scenes.palette import COLORS, FILLS, SHAPES
from gp_jax.scenes.questions import FAMILIES, PHRASES, Question, asks, pick, questions
from gp_jax.scenes.scene import make_scene
from gp_jax.scenes.source import packed_scene, scene_question
from gp_jax.scenes.things import Scene, Thing

pytestmark = pytest.mark.quick

CANVASES = [(256, 256), (256, 256), (160, 384), (128, 128), (336, 192), (96, 96)]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(np.random.default_rng(1000 + i), CANVASES[i % 6], unseen=i % 3 == 0) for i in range(600)]


def color(thing: Thing) -> str:
    return COLORS[thing.color]


def shape(thing: Thing) -> str:
    return SHAPES[thing.kind]


def named(things: list[Thing]) -> list[Thing]:
    return [thing for thing in things if thing.group in ("shape", "tiny")]


def shapes(things: list[Thing]) -> list[Thing]:
    return [thing for thing in things if thing.group == "shape"]


def called(things: list[Thing], kind: str) -> list[Thing]:
    return [thing for thing in named(things) if shape(thing) == kind]


def middle(thing: Thing) -> float:
    return (thing.box[0] + thing.box[2]) / 2


def in_a_row(things: list[Thing]) -> list[Thing]:
    row = sorted(things, key=middle)
    assert all(middle(b) - middle(a) >= 12 for a, b in zip(row[:-1], row[1:], strict=True))
    return row


def describe_kind(things, kind):
    return {f"{FILLS[thing.fill]} {color(thing)}" for thing in called(things, kind)}, called(things, kind)


def describe_fill(things, fill):
    found = [thing for thing in shapes(things) if FILLS[thing.fill] == fill]
    return {f"{color(thing)} {shape(thing)}" for thing in found}, found


def describe_color(things, word):
    found = [thing for thing in named(things) if color(thing) == word]
    return {f"{FILLS[thing.fill]} {shape(thing)}" for thing in found}, found


def relation(things, side, word, kind):
    anchors = [thing for thing in called(things, kind) if color(thing) == word]
    assert len(anchors) == 1
    (column, row), found = anchors[0].cell, []
    for thing in things:
        c, r = thing.cell
        if {"left of": r == row and c < column, "right of": r == row and c > column}.get(
            side, c == column and (r < row if side == "above" else r > row) and side in ("above", "below")
        ):
            found.append(thing)
    assert len(found) == 1 and found[0].group == "shape"
    return {f"{color(found[0])} {shape(found[0])}"}, [anchors[0], found[0]]


def tag(things, word):
    return [thing for thing in things if thing.group == "tag" and color(thing) == word]


def flat(things):
    """Colors of what could be called a shape without being one: tags, bars, the panel of a chart."""
    charts = [thing for thing in things if thing.group == "chart"]
    bars = {COLORS[bar.color] for chart in charts for bar in chart.bars}
    return bars | {color(thing) for thing in things if thing.group == "tag"} | ({"white"} if charts else set())


def number(things, word):
    return {thing.number for thing in tag(things, word)}, tag(things, word)


def bars(things, first, last):
    charts = [thing for thing in things if thing.group == "chart"]
    assert len(charts) == 1 and {first, last} == {"tallest", "shortest"}
    order = sorted(charts[0].bars, key=lambda bar: bar.box[1], reverse=first == "shortest")
    return {", ".join(COLORS[bar.color] for bar in order)}, charts


def beyond(things, word, bar_color):
    charts = [thing for thing in things if thing.group == "chart"]
    tops = {COLORS[bar.color]: bar.box[1] for bar in sorted(charts[0].bars, key=lambda bar: bar.box[0])}
    chosen = [name for name, top in tops.items() if (top < tops[bar_color] if word == "taller" else top > tops[bar_color])]
    return {", ".join(chosen)}, charts


def larger(things, one, other):
    found = called(things, one) + called(things, other)
    assert len(found) == 2 and all(thing.group == "shape" for thing in found)
    sides = [thing.box[2] - thing.box[0] for thing in found]
    assert abs(sides[0] - sides[1]) >= 7
    most = found[int(np.argmax(sides))]
    return {f"the {color(most)} {shape(most)}"}, found


def same(things, one, other):
    found = called(things, one) + called(things, other)
    assert len(found) == 2
    a, b = map(color, found)
    return {f"yes, both are {a}" if a == b else f"no, {a} and {b}"}, found


def tags(things, one, other):
    found = tag(things, one) + tag(things, other)
    assert len(found) == 2 and len({int(thing.number) for thing in found}) == 2
    most = max(found, key=lambda thing: int(thing.number))
    return {f"the {color(most)} tag with {most.number}"}, found


def row(things, word):
    found = [thing for thing in named(things) if color(thing) == word]
    assert 2 <= len(found) <= 3 and all(thing.group == "shape" for thing in found)
    return {", ".join(shape(thing) for thing in in_a_row(found))}, in_a_row(found)


def tiny(things):
    found = [thing for thing in things if thing.group == "tiny"]
    return {f"{color(thing)} {shape(thing)}" for thing in found}, found


def tinies(things):
    found = in_a_row([thing for thing in things if thing.group == "tiny"])
    assert len(found) == 2
    return {", ".join(f"{color(thing)} {shape(thing)}" for thing in found)}, found


C, S, F = (f"({'|'.join(words)})" for words in (COLORS, SHAPES, FILLS))
ORACLES = [
    (f"describe the {S}", describe_kind),
    (f"what does the {S} look like", describe_kind),
    (f"(?:what is|name) the {F} object", describe_fill),
    (f"what does the {C} shape look like", describe_color),
    (f"describe the {C} shape", describe_color),
    (f"(?:what is|which shape is|name the shape) directly (left of|right of|above|below) the {C} {S}", relation),
    (f"what number is on the {C} tag", number),
    (f"read the {C} tag", number),
    (f"which number does the {C} tag show", number),
    ("(?:list|name) the bars from (tallest|shortest) to (tallest|shortest)", bars),
    (f"(?:which bars are|list the bars) (taller|shorter) than the {C} bar,? from left to right", beyond),
    (f"which (?:is|shape is) larger, the {S} or the {S}", larger),
    (f"do the {S} and the {S} have the same color", same),
    (f"are the {S} and the {S} of the same color", same),
    (f"which (?:tag has the larger number|number is larger), the {C} one or the {C} one", tags),
    (f"(?:name|list) the {C} shapes from left to right", row),
    ("(?:what is|name) the tiny object", tiny),
    ("(?:name|list) the tiny objects from left to right", tinies),
]


def solve(things: list[Thing], question: str) -> tuple[set[str], list[Thing]]:
    """All answers that are right, and what shows them."""
    found = [(match, oracle) for pattern, oracle in ORACLES if (match := re.fullmatch(pattern + "[.?]", question))]
    assert len(found) == 1, question
    match, oracle = found[0]
    return oracle(things, *match.groups())


def check(scene: Scene, question: Question) -> None:
    answers, shown = solve(list(scene.things), question.question)
    assert answers == {question.answer}, (question, answers)
    assert len(shown) == len(question.boxes) and [thing.box for thing in shown] == list(question.boxes), question
    assert [scene.things[i].box for i in question.things] == list(question.boxes)
    # With all but the boxes blacked out the answer is the same.
    assert solve([scene.things[i] for i in question.things], question.question)[0] == {question.answer}


def test_all_questions_have_one_answer_that_their_boxes_show(scenes):
    asked = Counter()
    for scene in scenes:
        for ask in asks(scene):
            for i in range(len(PHRASES[ask.topic])):
                check(scene, ask.phrase(scene, i))
            asked[ask.family] += 1
    assert set(asked) == set(FAMILIES) and min(asked.values()) > 200


def test_records_of_all_splits(scenes):
    for split in ("train", "val", "test", "test_ood"):
        for i in range(60):
            check(*scene_question(split, i))


def test_all_that_can_be_asked_is(scenes):
    """The oracle finds no kind, fill or color that is unique and not asked about."""
    for scene in scenes[:100]:
        asked = {question.question for question in questions(scene)}
        things = list(scene.things)
        for kind in SHAPES:
            found = called(things, kind)
            panel = kind == "square" and any(thing.group == "chart" for thing in things)
            assert (f"describe the {kind}." in asked) == (len(found) == 1 and found[0].group == "shape" and not panel)
        for word in COLORS:
            found = [thing for thing in named(things) if color(thing) == word]
            alone = len(found) == 1 and found[0].group == "shape" and word not in flat(things)
            assert (f"what does the {word} shape look like?" in asked) == alone
            assert (f"what number is on the {word} tag?" in asked) == (len(tag(things, word)) == 1)
        count = len(tiny(things)[1])
        assert ("what is the tiny object?" in asked) == (count == 1)


def test_pick(scenes):
    families, several, yes = Counter(), [], Counter()
    for i, scene in enumerate(scenes):
        picked = pick(scene, np.random.default_rng(i), 6)
        assert picked == pick(scene, np.random.default_rng(i), 6)
        known = {(question.topic, question.boxes, question.answer) for question in questions(scene)}
        assert all((question.topic, question.boxes, question.answer) in known for question in picked)
        assert len(picked) == min(6, len(asks(scene)))
        counts = Counter(question.family for question in picked)
        possible = Counter(ask.family for ask in asks(scene))
        assert all(counts[family] >= min(possible[family], max(counts.values()) - 1) for family in possible)  # balanced
        assert len({question.question for question in picked}) == len(picked)
        families.update(counts)
        several += [len(question.answer.split()) > 1 for question in picked if question.family != "text"]
        yes.update(question.answer.split(",")[0] for question in picked if question.topic in ("same", "different"))
    assert set(families) == set(FAMILIES) and all(several)
    assert 0.3 < yes["yes"] / yes.total() < 0.6


def test_words_are_few_and_plain():
    words = set()
    for i in range(600):
        _, question = scene_question("train", i)
        assert question.question[-1] in ".?" and question.answer[-1] not in ".?"
        assert question.question == question.question.lower() and question.answer == question.answer.lower()
        words |= set(re.findall(r"[a-z]+", question.question + " " + question.answer))
    assert len(words) <= 100


def test_most_answers_have_several_words():
    answers = [question.answer for i in range(60) for question in packed_scene(0, i).questions]
    assert np.mean([len(answer.split()) > 1 for answer in answers]) > 0.7


def test_a_thing_in_the_way_takes_the_question_away():
    """Two things on one side: nothing is asked about that side."""
    for i in range(100):
        scene = make_scene(np.random.default_rng(i))
        for ask in asks(scene):
            if ask.topic != "side":
                continue
            target = scene.things[ask.things[1]]
            free = {(c, r) for c in range(6) for r in range(6)} - {thing.cell for thing in scene.things}
            anchor = scene.things[ask.things[0]]
            axis = 0 if "of" in ask.words[0] else 1
            beyond_it = [
                cell
                for cell in free
                if cell[1 - axis] == anchor.cell[1 - axis]
                and (cell[axis] - anchor.cell[axis]) * (target.cell[axis] - anchor.cell[axis]) > 0
            ]
            if beyond_it:
                left, top = (-(-part * 256 // 6) + 4 for part in beyond_it[0])
                extra = dataclasses.replace(
                    target, group="tag", kind=-1, number="123", cell=beyond_it[0], box=(left, top, left + 36, top + 26)
                )
                more = dataclasses.replace(scene, things=(*scene.things, extra))
                assert not any(a.topic == "side" and a.words == ask.words for a in asks(more))


def test_names_of_one_word_fit_no_tag_and_no_chart(scenes):
    """A tag and a bar are rectangles of one color, a chart stands on a white square."""
    asked = Counter()
    for scene in scenes:
        others = flat(scene.things)
        charted = any(thing.group == "chart" for thing in scene.things)
        for question in questions(scene):
            word = re.search(r"the (\w+) shapes?\b", question.question)
            assert not word or word[1] not in others, question
            assert not (charted and re.search(r"the (white )?square\b", question.question)), question
            asked["color"] += bool(word)
            asked["square"] += "the square" in question.question
    assert asked["color"] > 100 and asked["square"] > 20
