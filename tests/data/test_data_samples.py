"""Records to samples and batches: masks, tokens, lengths, background loading, each host's rows."""

import dataclasses
import io
import math
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import run_tools
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gp_jax import GlimpseError, make_mesh
from gp_jax.commands.label import three_states
from gp_jax.data.collate import Shape, lengths, train_batch
from gp_jax.data.feed import LoadMicroBatch, Placer, load, local_rows
from gp_jax.data.masks import box_mask, picture_mask
from gp_jax.data.prepared import open_prepared
from gp_jax.data.record import Entry, Record
from gp_jax.data.samples import LookSizes, SampleMaker
from gp_jax.data.schedule import Schedule
from gp_jax.data.settings import SHORT_ANSWER, DataConfig, DataSource
from gp_jax.pretrained.files import weights_digest
from gp_jax.training.build import build_feed, identity, open_source
from gp_jax.training.settings import TrainConfig


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    run_tools.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def vlm(home):
    from gp_jax import GlimpseVLM

    return GlimpseVLM.from_pretrained(home / "model")


@given(st.integers(1, 30), st.integers(1, 30), st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=4))
def test_box_masks_follow_the_formula(rows, columns, corners):
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    mask = box_mask(boxes, (rows, columns))
    for row in range(rows):
        for column in range(columns):
            inside = any(
                int(x1 * columns) <= column <= min(int(x2 * columns), columns - 1)
                and int(y1 * rows) <= row <= min(int(y2 * rows), rows - 1)
                for x1, y1, x2, y2 in boxes
            )
            assert mask[row, column] == inside


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
def test_picture_masks_keep_every_token_that_is_touched(rows, columns, height, width, seed):
    white = np.random.default_rng(seed).random((height, width)) < 0.05
    mask = picture_mask(png((white * 255).astype(np.uint8)), (rows, columns))
    for row in range(rows):
        for column in range(columns):
            y, x = np.arange(height), np.arange(width)
            touched_y = (y * rows < (row + 1) * height) & ((y + 1) * rows > row * height)
            touched_x = (x * columns < (column + 1) * width) & ((x + 1) * columns > column * width)
            assert mask[row, column] == white[np.ix_(touched_y, touched_x)].any()


def test_picture_masks_are_read_as_they_were_checked():
    """`gp-jax prepare` looks at the upright mask, of 16 bits the upper eight."""
    white = np.zeros((6, 4), bool)
    white[0, 1:] = True
    deep = np.where(white, 40000, 300).astype(np.uint16)  # 300 is black, though more than 255
    np.testing.assert_array_equal(picture_mask(png(deep), (6, 4)), white)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the stored picture's top is the upright one's right
    Image.fromarray((white * 255).astype(np.uint8)).save(buffer, format="PNG", exif=exif)
    np.testing.assert_array_equal(picture_mask(buffer.getvalue(), (4, 6)), np.rot90(white, -1))
    with pytest.raises(GlimpseError, match="mask: is not an image in a known format"):
        picture_mask(b"no picture", (4, 6))


def record(sizes: list[tuple[int, int]], boxes=None, **changes) -> Record:
    pictures = tuple(png(np.full((height, width, 3), 40 * i + 60, np.uint8)) for i, (width, height) in enumerate(sizes))
    boxes = boxes or tuple(((0.0, 0.0, 0.4, 0.4),) for _ in sizes)
    fields = dict(id="r:1", dataset="d", question="What?", answer=" red ", images=pictures, boxes=boxes, masks=(None,) * len(sizes))
    return Record(**(fields | changes))


def entry(r: Record, sizes: list[tuple[int, int]]) -> Entry:
    return Entry(r.id, r.dataset, r.question, r.answer, tuple(sizes))


@pytest.mark.parametrize("sizes", [[(224, 168)], [(300, 77), (64, 64)], []], ids=str)
@pytest.mark.parametrize("limit", [None, 20])
@pytest.mark.parametrize("rows", [1, 3, 0])
def test_lengths_known_beforehand_are_those_of_the_sample(vlm, sizes, limit, rows):
    maker, r = SampleMaker(vlm.processor, rows, limit), record(sizes)
    said = maker.measure([entry(r, sizes)], SHORT_ANSWER)[0]
    made = maker.make(r, SHORT_ANSWER)
    assert said.shape == lengths(made.prompt.slots.size, made.prompt.ids.size, made.answer.size, rows)
    assert said.answer == made.answer.size and said.visual == made.prompt.count == made.reference.size
    if limit:
        assert all(r * c <= limit for r, c in made.prompt.grids)
    tokenizer = vlm.processor.tokenizer
    assert tokenizer.decode(made.answer) == "red<|im_end|>"
    text = tokenizer.decode(made.prompt.ids)
    assert text.endswith(f"What?\n{SHORT_ANSWER}<|im_end|>\n<|im_start|>assistant\n")


def test_references_of_several_images_lie_behind_each_other(vlm):
    sizes = [(112, 112), (112, 56)]
    mask = np.zeros((56, 112), np.uint8)
    mask[:, 84:] = 255
    made = SampleMaker(vlm.processor, 1).make(record(sizes, (((0.0, 0.0, 0.2, 0.2),), ()), masks=(None, png(mask))))
    first, second = made.reference[:16].reshape(4, 4), made.reference[16:].reshape(2, 4)
    assert first.sum() == 1 and first[0, 0] and second.sum() == 2 and second[:, 3].all()


@pytest.mark.parametrize("sizes", [[(224, 168)], [(300, 77), (64, 64)], [(56, 56)], []], ids=str)
def test_records_at_the_size_of_a_first_look(vlm, sizes):
    """Lengths known beforehand are the sample's, the evidence is the same, small pictures stay as they are."""
    looks = LookSizes(1.0, (0.25, 0.125), 4, seed=0)
    plain, small = SampleMaker(vlm.processor, 1), SampleMaker(vlm.processor, 1, looks=looks)
    r = record(sizes)
    said, made, whole = small.measure([entry(r, sizes)], SHORT_ANSWER)[0], small.make(r, SHORT_ANSWER), plain.make(r, SHORT_ANSWER)
    assert said.shape == lengths(made.prompt.slots.size, made.prompt.ids.size, made.answer.size, 1)
    assert said.visual == made.prompt.count == made.reference.size
    assert made.prompt.count == whole.prompt.count if sizes in ([(56, 56)], []) else 2 * made.prompt.count <= whole.prompt.count
    first = 0
    for grid in made.prompt.grids:
        np.testing.assert_array_equal(made.reference[first : first + math.prod(grid)].reshape(grid), box_mask(r.boxes[0], grid))
        first += math.prod(grid)


def test_a_share_of_the_records_is_looked_at():
    looks = LookSizes(0.3, (0.25, 0.125), 4, seed=1)
    sizes = [looks.of(f"r:{n}") for n in range(2000)]
    assert 0.25 < sum(size is not None for size in sizes) / 2000 < 0.35 and {size.share for size in sizes if size} == {0.25, 0.125}
    assert sizes == [looks.of(f"r:{n}") for n in range(2000)]


def test_masks_of_three_states(vlm):
    """White is evidence, 64 unknown, everything else none; `gp-jax label` writes them so that no state reaches a neighbour."""
    states = np.full((6, 8), 0.05)
    states[1, 2], states[3, 3:5], states[5, 7] = 0.9, 0.3, 0.6
    picture = three_states(states, 0.1, 0.5, (230, 171))
    made = SampleMaker(vlm.processor, 1).make(record([(230, 171)], ((),), masks=(png(np.asarray(picture)),)))
    assert made.prompt.grids == ((6, 8),)
    np.testing.assert_array_equal(made.reference.reshape(6, 8), states > 0.5)
    np.testing.assert_array_equal(made.known.reshape(6, 8), ~((states >= 0.1) & (states <= 0.5)))
    batch = train_batch([made], vlm.config, 2, Shape(64, 128, 16), 1, [0])
    assert (~batch.known).sum() == 2 and not (batch.reference & ~batch.known).any()


def test_errors_name_the_record(vlm):
    with pytest.raises(GlimpseError, match=r"record r:1: picture 1: is not an image in a known format"):
        SampleMaker(vlm.processor, 1).make(record([(64, 64)], images=(b"no picture",)))


def feed(home, vlm, batch=4, rows=None, accumulation=2):
    maker = SampleMaker(vlm.processor, 1)
    sources = (DataSource(str(home / "data")),)
    opened = [open_prepared(source.path, source.split) for source in sources]
    lengths = [maker.measure(source.entries, "") for source in opened]
    schedule = Schedule(sources, lengths, batch=batch, shapes=2, window=vlm.config.vision.window_side**2, seed=0)
    return LoadMicroBatch(opened, maker, schedule, rows or range(batch), accumulation)


def leaves(batch) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]


def assert_same(a, b) -> None:
    assert a.number == b.number and a.shape == b.shape
    for x, y in zip(leaves(a.batch), leaves(b.batch), strict=True):
        np.testing.assert_array_equal(x, y)


def test_background_loading_is_in_order_and_resumes_anywhere(home, vlm):
    """From the start and from the middle; in threads and in processes, which a signal to the whole group must not end."""
    loader = feed(home, vlm)
    whole = list(load(loader, 0, 8, threads=3, prefetch=4, workers=0))
    assert [loaded.number for loaded in whole] == list(range(8))
    for workers in (0, 2):
        rest = load(loader, 5, 8, threads=3, prefetch=4, workers=workers)
        for a, b in zip(whole[5:], rest, strict=True):
            assert_same(a, b)
            if a.number == 6:  # both have given something, so neither is still starting
                children = [child for child in multiprocessing.active_children() if child.name.startswith("grain")]
                assert bool(children) == bool(workers)
                for child in children:
                    os.kill(child.pid, signal.SIGTERM)


def test_hosts_load_disjoint_rows_of_the_same_batches(home, vlm):
    whole, low, high = (feed(home, vlm, rows=rows) for rows in (range(4), (0, 1), (2, 3)))
    for number in range(whole.schedule.epoch_end(1)):
        a, b, c = (loader.map(number) for loader in (whole, low, high))
        assert a.shape == b.shape == c.shape and (b.rows, c.rows) == ((0, 1), (2, 3))
        for name in ("reference", "number"):
            np.testing.assert_array_equal(getattr(a.batch, name), np.concatenate([getattr(b.batch, name), getattr(c.batch, name)]))
        np.testing.assert_array_equal(
            a.batch.prompt.positions, np.concatenate([b.batch.prompt.positions, c.batch.prompt.positions], axis=1)
        )


def test_a_run_is_known_by_its_evidence_and_weights(home, vlm):
    source, model = str(home / "data"), home / "model"
    config = TrainConfig(model=str(model), data=DataConfig(sources=(DataSource(source), DataSource("scenes:4"))))
    feed = build_feed(config, config.data.sources, SampleMaker(vlm.processor, 1), None, lambda items, *_: items)
    digest = weights_digest(model, without=("glimpse.safetensors", "new_modules_gp.pt"))
    found = identity(config, vlm.glimpse_config, feed, 3, digest)
    assert found["data"]["records"]["evidence"] == [feed.sources[0].made_from] and found["weights"] == digest
    assert digest != weights_digest(model), "there is a glimpse in the folder, which a run replaces"


def test_samples_are_numbered_through_a_step(home, vlm):
    loader = feed(home, vlm, batch=3, accumulation=2)
    numbers = [[n for n in loader.map(i).batch.number if n >= 0] for i in range(4)]
    assert numbers[0] == [0, 1, 2] and numbers[1] == [3, 4, 5] and numbers[2] == [0, 1, 2]


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8), (8, 1, 1)], ids=str)
def test_placing_on_a_mesh_keeps_every_value(home, vlm, shape):
    loaded = feed(home, vlm, batch=8).map(0)
    mesh = make_mesh(*shape)
    assert local_rows(mesh, 8) == local_rows(None, 8) == tuple(range(8))
    placed = Placer(mesh, 8)(loaded.batch, loaded.rows)
    for x, y in zip(leaves(loaded.batch), leaves(placed), strict=True):
        np.testing.assert_array_equal(x, y)
    assert len(placed.reference.sharding.device_set) == 8


def test_rows_that_are_not_neighbours(home, vlm):
    """On a TPU torus a host holds rows such as 0, 3: they are those rows of the whole batch, and land where they belong."""
    whole, own = feed(home, vlm).map(0), feed(home, vlm, rows=(0, 3)).map(0)
    np.testing.assert_array_equal(own.batch.reference, whole.batch.reference[[0, 3]])
    np.testing.assert_array_equal(own.batch.number, whole.batch.number[[0, 3]])


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(GlimpseError, match=r"batch_size=3 is not a multiple of data x fsdp = 4"):
        local_rows(make_mesh(2, 2, 2), 3)


def test_loaders_can_be_sent_to_worker_processes(home, vlm):
    loader = pickle.loads(pickle.dumps(feed(home, vlm)))
    assert dataclasses.is_dataclass(loader.map(0))


def test_scenes_of_some_kind_are_a_source():
    source = open_source(DataSource("scenes:6:text,chart:64-121", split="val"))
    assert len(source) == 6 and source.only == ("text", "chart") and source.tokens == (64, 121)
    for path, message in (
        ("scenes:0", "say how many"),
        ("scenes:", "say how many"),
        ("scenes:4:txet", "did you mean 'text'"),
        ("scenes:4:", "''"),
    ):
        with pytest.raises(GlimpseError, match=message):
            open_source(DataSource(path))
