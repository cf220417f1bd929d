"""Generated scenes: the same everywhere, exact boxes, apart splits, labels that agree with the things, folders that read back."""

import hashlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter

import grain
import numpy as np
import pytest
from PIL import Image

from gp_jax.data.masks import box_mask
from gp_jax.data.prepared import open_prepared
from gp_jax.errors import GlimpseError
from gp_jax.scenes.draw import draw, without
from gp_jax.scenes.labels import BARS, COLORS, DIGITS, FILLS, KINDS, NEIGHBORS, TAG_GROUND, TINY, labels
from gp_jax.scenes.palette import RGB, TINY_SHAPES, held_out
from gp_jax.scenes.questions import FAMILIES
from gp_jax.scenes.scene import BACKGROUNDS, cells, make_scene
from gp_jax.scenes.source import SPLIT_SEED, ScenesSource, canvas_of, families, packed_scene, scene_entry, scene_question, scene_record
from gp_jax.scenes.write import write

CANVASES = [(256, 256), (192, 336), (128, 128), (96, 192), (384, 384)]


@pytest.fixture(scope="module")
def scenes():
    """Of several sizes, half of them with held-out pairs."""
    return [make_scene(np.random.default_rng(i), CANVASES[i % 5], unseen=i % 2 == 1) for i in range(200)]


def digest() -> str:
    """Of records and packed scenes."""
    found = hashlib.sha256()
    for split in SPLIT_SEED:
        for i in (0, 7, 100_003):
            record = scene_record(split, i)
            found.update(repr(record).encode())
    packed = packed_scene(3, 5)
    found.update(packed.image.tobytes() + repr(packed.questions).encode() + packed.labels.kind.tobytes())
    return found.hexdigest()


def test_the_same_in_every_process():
    code = "from tests.scenes.test_scenes import digest; print(digest())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert other.stdout.split()[-1] == digest() == digest()


def test_the_same_everywhere():
    """Figures are of these questions: who changes this digest takes them anew."""
    asked = [scene_question(split, i)[1] for split in SPLIT_SEED for i in range(30)]
    lines = [[question.question, question.answer, [list(map(int, box)) for box in question.boxes]] for question in asked]
    assert hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16] == "22e16757a7978c9f"


def test_things_stay_in_their_cells(scenes):
    for scene in scenes:
        (width, height), (columns, rows) = scene.canvas, cells(scene.canvas)
        assert len({thing.cell for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            (x0, y0, x1, y1), (column, row) = thing.box, thing.cell
            assert column * width <= x0 * columns and x1 * columns <= (column + 1) * width
            assert row * height <= y0 * rows and y1 * rows <= (row + 1) * height
        for a, b in itertools.combinations(scene.things, 2):
            assert (a.cell[1] == b.cell[1]) == (a.box[1] < b.box[3] and b.box[1] < a.box[3])
            assert (a.cell[0] == b.cell[0]) == (a.box[0] < b.box[2] and b.box[0] < a.box[2])


def test_counts_and_sizes(scenes):
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    for scene in scenes:
        columns, rows = cells(scene.canvas)
        groups = Counter(thing.group for thing in scene.things)
        assert 4 <= len(scene.things) <= min(12, columns * rows - 1)
        assert 1 <= groups["tag"] <= 3 and groups["chart"] <= 1 and groups["tiny"] <= 2 and groups["shape"] >= 2
        for thing in scene.things:
            side = thing.box[2] - thing.box[0]
            if thing.group == "shape":
                assert 30 <= side <= 36 if thing.large else 20 <= side <= 23
            elif thing.group == "tiny":
                assert 14 <= side <= 16 and thing.fill == 0 and thing.kind in TINY_SHAPES
            elif thing.group == "tag":
                assert all(box[3] - box[1] >= 19 for _, box in thing.digits) and len(thing.number) in (2, 3)
                assert thing.digits[0][1][0] > thing.box[0] and thing.digits[-1][1][2] < thing.box[2]
            else:
                heights = sorted(bar.height for bar in thing.bars)
                assert len(heights) in (3, 4) and min(np.diff(heights)) >= 6 and heights[0] >= 6
                assert len({bar.color for bar in thing.bars}) == len(heights)
                assert all(thing.box[0] < bar.box[0] and bar.box[2] < thing.box[2] and thing.box[1] < bar.box[1] for bar in thing.bars)
        assert len({thing.color for thing in scene.things if thing.group == "tag"}) == groups["tag"]
        assert len({thing.number for thing in scene.things if thing.group == "tag"}) == groups["tag"]


def test_small_canvases_and_bad_ones():
    assert {len(make_scene(np.random.default_rng(i), (64, 64)).things) for i in range(20)} == {1}
    assert max(len(make_scene(np.random.default_rng(i), (96, 96)).things) for i in range(20)) == 3
    for canvas in ((100, 256), (256, 48)):
        with pytest.raises(GlimpseError, match="canvas"):
            make_scene(np.random.default_rng(0), canvas)


def test_colors_stay_apart():
    rgb = np.array(RGB, int)
    apart = np.abs(rgb[:, None] - rgb[None]).max(-1) + 999 * np.eye(8, dtype=int)
    assert apart.min() >= 75  # jitter and noise move a channel by less than 32


def test_boxes_are_exact(scenes):
    for scene in scenes[:60]:
        picture = draw(scene)
        assert picture.shape == (scene.canvas[1], scene.canvas[0], 3) and picture.dtype == np.uint8
        for thing in scene.things:
            y, x = np.nonzero((picture != draw(without(scene, thing))).any(-1))
            seen, (x0, y0, x1, y1) = (x.min(), y.min(), x.max() + 1, y.max() + 1), thing.box
            assert x0 <= seen[0] <= x0 + 2 and y0 <= seen[1] <= y0 + 2 and x1 - 2 <= seen[2] <= x1 and y1 - 2 <= seen[3] <= y1


def test_splits_are_apart():
    pictures = [hashlib.sha256(scene_record(split, i).images[0]).digest() for split in SPLIT_SEED for i in range(60)]
    assert len(set(pictures)) == len(pictures)
    described = [scene_question(split, i)[0] for split in SPLIT_SEED for i in range(300)]
    assert len({repr(scene) for scene in described}) == len(described)


def test_held_out_pairs():
    def pairs(things) -> list[bool]:
        return [held_out(thing.color, thing.kind) for thing in things if thing.is_named]

    for split in ("train", "val", "test"):
        assert not any(any(pairs(scene_question(split, i)[0].things)) for i in range(300))
    assert not any(any(pairs(make_scene(np.random.default_rng(i)).things)) for i in range(300))
    for i in range(240):
        scene, question = scene_question("test_ood", i)
        if question.family not in ("text", "chart"):
            asked = question.things[1:] if question.family == "relation" else question.things
            assert any(pairs(scene.things[j] for j in asked)), question


def test_sizes_of_the_benchmark():
    rng = np.random.default_rng(0)
    for split, low, high in (("train", 64, 400), ("test", 64, 400), ("test_ood", 400, 576)):
        sizes = np.array([canvas_of(rng, split) for _ in range(600)])
        tokens = sizes.prod(1) // 256
        assert (sizes % 16 == 0).all() and tokens.min() >= low and tokens.max() <= high
        assert (sizes.max(1) <= 2 * sizes.min(1)).all() and len(np.unique(sizes, axis=0)) > 20
        if split != "test_ood":
            assert 0.5 < ((tokens >= 240) & (tokens <= 272)).mean() < 0.75


def test_labels_agree_with_things(scenes):
    for scene in scenes:
        found = labels(scene)
        height, width = scene.canvas[1], scene.canvas[0]
        assert found.kind.shape == found.color.shape == found.fill.shape == (height // 8, width // 8)
        assert found.neighbor.shape == (4, 2, height // 16, width // 16)
        for array, classes in ((found.kind, KINDS), (found.color, COLORS), (found.fill, FILLS), (found.neighbor, NEIGHBORS)):
            assert array.dtype == np.int8 and array.max() < classes
        owner = np.full((height, width), -1)
        for i, thing in enumerate(scene.things):
            x0, y0, x1, y1 = thing.box
            owner[y0:y1, x0:x1] = i
        for row, column in np.ndindex(found.kind.shape):
            patch = owner[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            counts = Counter(patch[patch >= 0].tolist())
            label = (found.kind[row, column], found.color[row, column], found.fill[row, column])
            if not counts or max(counts.values()) <= 0.3 * 64:
                assert label == (0, 0, 0)
                continue
            i, most = counts.most_common(1)[0]
            if list(counts.values()).count(most) > 1:
                continue
            thing = scene.things[i]
            if thing.group == "shape":
                assert label == (1 + thing.kind, 1 + thing.color, 1 + thing.fill)
            elif thing.group == "tiny":
                assert label == (TINY + TINY_SHAPES.index(thing.kind), 1 + thing.color, 1)
            elif thing.group == "tag":
                assert label[0] in {0, TAG_GROUND, *(DIGITS + int(digit) for digit in thing.number)}
                assert label[1] in (0, 1 + thing.color) and label[2] == 0
            else:
                ranked = sorted(thing.bars, key=lambda bar: -bar.height)
                assert label[:2] in {(0, 0), *((BARS + rank, 1 + bar.color) for rank, bar in enumerate(ranked))}


def test_labels_find_digits_and_bars(scenes):
    for scene in scenes:
        found = labels(scene)
        for thing in scene.things:
            for digit, (x0, y0, x1, y1) in thing.digits if thing.group == "tag" else []:
                assert (found.kind[y0 // 8 : -(-y1 // 8), x0 // 8 : -(-x1 // 8)] == DIGITS + digit).any()
            for bar in thing.bars:
                x0, y0, x1, y1 = bar.box
                rank = sum(other.height > bar.height for other in thing.bars)
                if bar.height >= 16 and len(thing.bars) == 3:  # 10 px wide
                    assert (found.kind[y0 // 8 : -(-y1 // 8), x0 // 8 : -(-x1 // 8)] == BARS + rank).any()


def test_neighbor_labels(scenes):
    for scene in scenes:
        found, named = labels(scene).neighbor, np.zeros((scene.canvas[1] // 16, scene.canvas[0] // 16), bool)
        for thing in scene.things:
            if not thing.is_named:
                continue
            for d in range(4):
                axis, sign = (0, 1)[d // 2], (-1, 1)[d % 2]
                others = [
                    other
                    for other in scene.things
                    if other.cell[1 - axis] == thing.cell[1 - axis] and sign * (other.cell[axis] - thing.cell[axis]) > 0
                ]
                wanted = (0, 0)
                if len(others) == 1 and others[0].group == "shape":
                    wanted = (1 + others[0].kind, 1 + others[0].color)
                x, y = (int(value) // 16 for value in thing.centre)
                assert tuple(found[d, :, y, x]) == wanted
            x0, y0, x1, y1 = thing.box
            named[y0 // 16 : -(-y1 // 16), x0 // 16 : -(-x1 // 16)] = True
        assert (found[:, :, ~named] == -1).all() and ((found == -1).all((0, 1)) | (found >= 0).all((0, 1))).all()


def test_records():
    for split in SPLIT_SEED:
        for i in range(12):
            record, entry = scene_record(split, i), scene_entry(split, i)
            picture = Image.open(io.BytesIO(record.images[0]))
            assert entry.sizes == (picture.size,) and picture.format == "BMP"
            assert (entry.id, entry.dataset, entry.question, entry.answer) == (
                record.id,
                record.dataset,
                record.question,
                record.answer,
            )
            scene, question = scene_question(split, i)
            assert families(record) == question.family == FAMILIES[i % 6]
            np.testing.assert_array_equal(np.asarray(picture), draw(scene))
            boxes = np.array(record.boxes[0]) * [*picture.size, *picture.size]
            np.testing.assert_allclose(boxes, question.boxes)
            assert 0 < box_mask(record.boxes[0], (picture.height // 16, picture.width // 16)).mean() < 0.6


def test_source_is_one_of_grain_and_pickles():
    source = ScenesSource("val", 13, start=5)
    assert isinstance(source, grain.sources.RandomAccessDataSource) and len(source) == 13
    assert source[2] == pickle.loads(pickle.dumps(source))[2] == scene_record("val", 7) == source[np.int64(2)]
    assert source[-1] == list(source)[-1] and [entry.id for entry in source.entries] == [record.id for record in source]
    dataset = grain.MapDataset.source(source).map(lambda record: record.id)
    assert dataset[3] == "val-000008"
    other = ScenesSource("val", 13, start=5, seed=7)
    assert other[0].id == "val-s7-000005" and other[0].images != source[0].images and families(other[0]) == families(source[0])
    assert other[3] == pickle.loads(pickle.dumps(other))[3] == scene_record("val", 8, seed=7)
    some = ScenesSource("val", 7, start=1, only=("detail", "text"))
    assert [families(record) for record in some] == ["detail", "text"] * 3 + ["detail"] and len({record.id for record in some}) == 7
    assert some[1] == pickle.loads(pickle.dumps(some))[1] == scene_record("val", 8) and some.entries[1].id == some[1].id
    small = ScenesSource("val", 5, only=("text",), tokens=(64, 121))
    assert small[1] == pickle.loads(pickle.dumps(small))[1] and small[1].id == "val-t64to121-000008" and families(small[1]) == "text"
    assert all(64 <= w * h / 256 <= 121 for entry in small.entries for w, h in entry.sizes)
    with pytest.raises(GlimpseError, match="did you mean 'text'"):
        ScenesSource("val", 3, only=("txt",))
    with pytest.raises(GlimpseError, match="no canvas has 5 to 9 visual tokens"):
        ScenesSource("val", 3, tokens=(5, 9))
    with pytest.raises(IndexError):
        source[13]
    for split, count in (("exam", 3), ("val", 0)):
        with pytest.raises(GlimpseError):
            ScenesSource(split, count)


def test_packed_scenes_differ_and_show_no_held_out_pairs():
    packed = [packed_scene(seed, i, (128, 160), 4) for seed in (0, 1) for i in range(20)]
    assert len({scene.image.tobytes() for scene in packed}) == 40
    assert all(scene.image.shape == (160, 128, 3) and 1 <= len(scene.questions) <= 4 for scene in packed)


def test_written_folder_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr("gp_jax.scenes.write.RECORDS_PER_SHARD", 5)
    write(tmp_path / "out", "test", 12, start=6, progress=False)
    source, made = open_prepared(tmp_path / "out", "test"), ScenesSource("test", 12, start=6)
    assert source.entries == made.entries and len(source) == 12
    assert [source[i] for i in range(12)] == list(made)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(GlimpseError, match="exists"):
        write(tmp_path / "out", "test", 12)
    (tmp_path / "file").write_text("")
    with pytest.raises(GlimpseError, match="cannot be written"):
        write(tmp_path / "file" / "out", "test", 12)


def test_command(tmp_path):
    command = [sys.executable, "-m", "gp_jax.scenes", str(tmp_path / "out"), "--split", "test_ood", "--count", "2"]
    assert "2 records (test_ood)" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.count("\n") == 1 and "exists" in again.stderr
