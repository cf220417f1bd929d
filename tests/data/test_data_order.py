"""Which records, in which order, in which shapes: sampling, mixtures, buckets, micro-batches."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp_jax import GlimpseError
from gp_jax.data.collate import Shape
from gp_jax.data.sampling import mixture, sample
from gp_jax.data.schedule import Length, Schedule
from gp_jax.data.settings import DataSource, parse_sampling
from gp_jax.data.shapes import bucket_of, fit_shapes, padding, round_up

pytestmark = pytest.mark.quick

WINDOW = 16


@pytest.mark.parametrize("text", ["random", "random:", "random:0", "random:-3", "last:4", "random:1.5", "", "all:3"])
def test_unknown_sampling(text):
    with pytest.raises(GlimpseError, match="is not all, random:N"):
        parse_sampling(text)


def test_sampling_strategies():
    assert sample(5, "all", 0).tolist() == [0, 1, 2, 3, 4]
    assert sample(5, "first:2", 0).tolist() == [0, 1] and sample(5, "end:2", 0).tolist() == [3, 4]
    drawn = sample(1000, "random:100", 7)
    assert len(set(drawn.tolist())) == 100 and drawn.max() < 1000
    np.testing.assert_array_equal(drawn, sample(1000, "random:100", 7))
    assert (drawn != sample(1000, "random:100", 8)).any()
    assert sample(5, "random:100", 0).size == 5, "never more than there are"


def test_mixture_weights_are_shares():
    sources = (DataSource("a", weight=3.0), DataSource("b", weight=1.0))
    members = [np.arange(50), np.arange(350)]
    drawn = mixture(members, sources, seed=0, epoch=0)
    assert len(drawn) == 400
    counts = {s: sum(source == s for source, _ in drawn) for s in (0, 1)}
    assert counts == {0: 300, 1: 100}
    assert {record for source, record in drawn if source == 0} == set(range(50)), "repeated whole"
    assert len({record for source, record in drawn if source == 1}) == 100, "none twice before all once"
    assert drawn != mixture(members, sources, seed=0, epoch=1) and drawn == mixture(members, sources, seed=0, epoch=0)


def lengths_of(sizes: list[tuple[int, int, int]]) -> list[Length]:
    return [Length(Shape(round_up(visual, WINDOW), visual + text, answer), answer, visual) for visual, text, answer in sizes]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(2, 120), st.integers(1, 40)), min_size=1, max_size=60), st.integers(1, 6))
def test_every_record_fits_a_bucket_and_there_are_not_too_many(sizes, count):
    shapes = [length.shape for length in lengths_of(sizes)]
    buckets = fit_shapes(shapes, count, WINDOW)
    assert 1 <= len(buckets) <= count
    for shape in shapes:
        bucket = bucket_of(shape, buckets)
        assert bucket.slots % WINDOW == 0 and bucket.prompt >= shape.prompt and bucket.slots >= shape.slots and bucket.tail >= shape.tail
    assert padding(shapes, fit_shapes(shapes, count + 1, WINDOW)) <= padding(shapes, buckets) + 1e-9, "one more never pads more"


@settings(max_examples=20)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7, unique=True), st.integers(1, 4))
def test_buckets_are_the_best_there_are(rungs, count):
    """Against every way to cut the sorted lengths."""
    shapes = [Shape(16, 16 * rung, 16) for rung in rungs]
    found = padding(shapes, fit_shapes(shapes, count, 16))
    tops = sorted({round_up(s.prompt) for s in shapes})
    best = min(
        padding(shapes, [Shape(16, top, 16) for top in chosen])
        for n in range(1, min(count, len(tops)) + 1)
        for chosen in itertools.combinations(tops, n)
        if chosen[-1] == tops[-1]
    )
    assert found == pytest.approx(best)


def visual_cot_lengths(shared) -> list[Length]:
    """Lengths of the released sample annotations under Qwen2.5-VL's resizing, about four characters a token."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    from gp_jax.processing.windows import pack_windows

    found = []
    for path in sorted((shared / "visual_cot" / "train").glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            height, width = smart_resize(row["height"], row["width"], factor=28, min_pixels=3136, max_pixels=4096 * 784)
            grid = (height // 28, width // 28)
            slots, answer = pack_windows([grid], 4)[0].size, len(row["answer"]) // 4 + 2
            found.append(Length(Shape(slots, grid[0] * grid[1] + 30 + len(row["question"]) // 4, answer), answer, grid[0] * grid[1]))
    return found


def test_padding_on_visual_cot_sizes_is_under_a_fifth(shared):
    lengths = visual_cot_lengths(shared)
    schedule = Schedule((DataSource("vcot"),), [lengths], batch=8, shapes=8, window=WINDOW, seed=0)
    assert schedule.padding < 0.20
    held = used = 0
    for number in range(schedule.epoch_end(1)):  # empty rows of the last micro-batches count too
        planned = schedule[number]
        held += 8 * (planned.shape.slots + planned.shape.prompt + planned.shape.tail)
        used += sum((lambda s: s.slots + s.prompt + s.tail)(lengths[r].shape) for _, r in planned.members)
    assert 1 - used / held < 0.20
    assert len({schedule[n].shape for n in range(schedule.epoch_end(1))}) <= 8


def make_schedule(batch: int = 4, seed: int = 0, count: int = 50) -> Schedule:
    rng = np.random.default_rng(1)
    own = lengths_of([(int(rng.integers(16, 400)), 20, int(rng.integers(1, 20))) for _ in range(count)])
    own[7] = None  # left out
    return Schedule((DataSource("a"),), [own], batch=batch, shapes=3, window=WINDOW, seed=seed)


def test_an_epoch_holds_every_record_once():
    schedule = make_schedule()
    for epoch in range(3):
        members = [m for n in range(schedule.epoch_end(epoch), schedule.epoch_end(epoch + 1)) for m in schedule[n].members]
        assert sorted(r for _, r in members) == [r for r in range(50) if r != 7]
    for n in range(schedule.epoch_end(2)):
        planned = schedule[n]
        assert 1 <= len(planned.members) <= 4
        for s, r in planned.members:
            need = schedule.lengths[s][r].shape
            assert need.slots <= planned.shape.slots and need.prompt <= planned.shape.prompt and need.tail <= planned.shape.tail


def test_order_is_a_function_of_the_seed_and_the_position():
    a, b, c = make_schedule(), make_schedule(), make_schedule(seed=1)
    end = a.epoch_end(3)
    backwards = {n: b[n] for n in reversed(range(end))}  # asked for in another order
    assert all(a[n] == backwards[n] for n in range(end))
    assert [a[n] for n in range(5)] != [c[n] for n in range(5)]
    assert [a[n] for n in range(a.epoch_end(1))] != [a[n] for n in range(a.epoch_end(1), a.epoch_end(2))][: a.epoch_end(1)]


def test_counts_are_those_of_the_members():
    schedule = make_schedule()
    tokens, samples = schedule.counts(range(3))
    members = [schedule.lengths[s][r] for n in range(3) for s, r in schedule[n].members]
    assert tokens == sum(m.answer for m in members) and samples == len(members)


def test_nothing_left_to_train_on():
    with pytest.raises(GlimpseError, match="no record is left of a"):
        Schedule((DataSource("a"),), [[None, None]], batch=1, shapes=1, window=16, seed=0)


def test_a_weight_without_records_is_refused():
    """A share of nothing would be taken by the other sources."""
    sources = (DataSource("a", weight=1.0), DataSource("b", split="val", weight=2.0))
    with pytest.raises(GlimpseError, match=r"data source b \(val\): weight=2.0, but none of its records is left"):
        Schedule(sources, [lengths_of([(16, 20, 5)]), [None, None]], batch=1, shapes=1, window=16, seed=0)
