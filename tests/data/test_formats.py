"""Annotation rows: what each public format says, and every reason for which a row is refused."""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gp_jax.data.checks import TO_UPRIGHT, Checker
from gp_jax.data.formats import BadRow, parse_row
from gp_jax.data.sources import cut, find_files, scan
from gp_jax.errors import GlimpseError
from gp_jax.processing.images import open_image

pytestmark = pytest.mark.quick

BASE = {"image": "a.png", "question": "Which?", "answer": "this", "boxes": [[10, 20, 60, 50]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures, broken pictures and masks."""
    folder = tmp_path_factory.mktemp("images")
    photo = Image.effect_noise((100, 80), 50).convert("RGB")
    photo.save(folder / "a.png")
    photo.resize((50, 50)).save(folder / "square.png")
    photo.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.jpg").touch()
    (folder / "folder.jpg").mkdir()
    (folder / "bomb.png").write_bytes(_bomb())
    for place in ("cot/cub/deep", "cub2", "cot/textvqa"):
        (folder / place).mkdir(parents=True)
    photo.save(folder / "cot/cub/deep/b.png")
    photo.save(folder / "cub2/c.png")
    photo.save(folder / "cot/textvqa/d.png")
    exif = Image.Exif()
    for orientation in TO_UPRIGHT:
        exif[0x0112] = orientation
        photo.save(folder / f"turned{orientation}.jpg", exif=exif)
    mask = np.zeros((80, 100), np.uint8)
    mask[20:50, 10:60] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask).resize((50, 40)).save(folder / "mask_half.png")
    Image.fromarray(mask).resize((50, 50)).save(folder / "mask_square.png")
    Image.fromarray(mask // 255).save(folder / "mask_ones.png")
    Image.fromarray(np.stack([mask, mask, mask, mask], -1)).save(folder / "mask_see_through.png")
    (folder / "mask_broken.png").write_bytes((folder / "mask.png").read_bytes()[:60])
    (folder.parent / "outside.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def _bomb() -> bytes:
    """A PNG header that promises 10^10 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def read(folder: Path, fields: dict | None = None, option: str = "auto", **changes):
    row = parse_row(json.dumps((fields or BASE) | changes).encode(), "own.jsonl:3", "own", option)
    return Checker(folder).check(row)[0]


def refused(folder: Path, fields: dict | None = None, option: str = "auto", **changes) -> BadRow:
    with pytest.raises(BadRow) as caught:
        read(folder, fields, option, **changes)
    return caught.value


def benchmark(image: object = None, turns: list[str] | None = None, **changes) -> dict:
    request = " Please provide the bounding box coordinate of the region that can help you answer the question better."
    turns = turns or [f"<image>\nWhat is it?{request}", "[0.1, 0.3, 0.6, 0.6]", "<image>", "A bird."]
    return {
        "dataset": "cub",
        "split": "val",
        "question_id": 7,
        "image": image or ["cot/cub/deep/b.png", "cot/cub/deep/b.png###[10, 20, 60, 50]"],
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(turns)],
    } | changes


class TestFormats:
    def test_own(self, folder):
        record = read(folder)
        assert (record.id, record.dataset, record.question, record.answer) == ("own.jsonl:3", "own", "Which?", "this")
        np.testing.assert_allclose(record.boxes, [[[0.1, 0.25, 0.6, 0.625]]], rtol=1e-6)
        assert record.images == ((folder / "a.png").read_bytes(),) and record.masks == (None,)

    @pytest.mark.parametrize("name", ["boxes", "bboxes", "bboxs", "bbox"])
    @pytest.mark.parametrize("value", [[10, 20, 60, 50], [[10, 20, 60, 50]], [[[10, 20, 60, 50]]]])
    def test_names_and_depths_of_boxes(self, folder, name, value):
        fields = {key: value for key, value in BASE.items() if key != "boxes"}
        assert read(folder, fields, **{name: value}).boxes == read(folder).boxes

    @pytest.mark.parametrize(
        ("boxes", "said"),
        [
            ([0.1, 0.25, 0.6, 0.625], None),
            ([0.1, 0.25, 0.6, 0.625], "normalised"),
            ([100, 250, 600, 625], "0-1000"),
            ([100, 250, 600, 625], "qwen"),
            ([100, 250, 600, 625], "per_mille"),
            ([10, 20, 60, 50], "pixel"),
            ([10.0, 20.0, 60.0, 50.0], None),
        ],
    )
    def test_box_formats(self, folder, boxes, said):
        np.testing.assert_allclose(read(folder, boxes=[boxes], box_format=said).boxes, read(folder).boxes, rtol=1e-6)
        np.testing.assert_allclose(read(folder, boxes=[boxes], box_type=said).boxes, read(folder).boxes, rtol=1e-6)

    def test_the_option_is_above_the_row(self, folder):
        record = read(folder, BASE | {"box_format": "pixel"}, "0-1000")
        np.testing.assert_allclose(record.boxes, [[[0.01, 0.02, 0.06, 0.05]]], rtol=1e-6)

    def test_whole_picture_as_fractions(self, folder):
        assert read(folder, boxes=[[0.0, 0.0, 1.0, 1.0]]).boxes == (((0.0, 0.0, 1.0, 1.0),),)

    def test_several_images(self, folder):
        record = read(
            folder, images=["a.png", "square.png", "whole.jpg"], image=None, boxes=[[10, 20, 60, 50], None, [[1, 2, 3, 4], [5, 6, 7, 8]]]
        )
        assert [len(boxes) for boxes in record.boxes] == [1, 0, 2] and len(record.images) == 3

    def test_masks(self, folder):
        assert read(folder, boxes=None, mask="mask.png").masks == ((folder / "mask.png").read_bytes(),)
        assert read(folder, boxes=None, mask="mask_half.png").masks[0]
        record = read(folder, image=["a.png", "square.png"], boxes=None, mask=[None, "mask_square.png"])
        assert record.masks[0] is None and record.masks[1] and record.boxes == ((), ())

    def test_answers_may_be_numbers(self, folder):
        assert read(folder, answer=31).answer == "31"

    def test_benchmark(self, folder):
        record = read(folder, benchmark())
        assert (record.id, record.question, record.answer) == ("cub/7", "What is it?", "A bird.")
        np.testing.assert_allclose(record.boxes, [[[0.1, 0.25, 0.6, 0.625]]], rtol=1e-6)

    def test_benchmark_box_from_the_conversation(self, folder):
        """100 x 80 padded to 100 x 100: y = 0.3 of the square is (30 - 10) / 80 of the picture."""
        record = read(folder, benchmark(image=["cot/cub/deep/b.png"]))
        np.testing.assert_allclose(record.boxes, [[[0.1, 0.25, 0.6, 0.625]]], rtol=1e-6)

    def test_benchmark_refusals(self, folder):
        assert refused(folder, benchmark(image=["cot/cub/deep/b.png", "cot/cub/deep/b.png###[1, 2"])).reason == "box not numbers"
        assert refused(folder, benchmark(turns=["<image>\nWhat?", "[0.1, 0.3, 0.6, 0.6]"])).reason == "field missing"
        assert refused(folder, benchmark(turns=["What?"])).reason == "field missing"
        assert refused(folder, benchmark(conversations="What?")).reason == "field not text"
        assert refused(folder, benchmark(image=["cot/cub/deep/b.png"], turns=["What?", "where", "", "x"])).reason == "no evidence"
        assert refused(folder, benchmark(image=["cot/cub/deep/b.png###[1, 2, 999, 4]"])).reason == "box outside the picture"

    def test_released_boxes_agree_with_their_conversations(self, shared):
        """The pixel box, and the square box with the padding undone, are the same region of the same picture."""
        for path in sorted((shared / "visual_cot" / "benchmark").glob("*.json")):
            for fields in json.loads(path.read_text())[:40]:
                row = parse_row(json.dumps(fields).encode(), "x", "y")
                assert "Please provide" not in row.question and "<image>" not in row.question and row.frame == "pixel"
                pixels, square = np.array(row.boxes[0][0], float), np.array(json.loads(fields["conversations"][1]["value"]))
                wide, high = pixels[2:] - pixels[:2], square[2:] - square[:2]
                if wide.min() > 100:
                    assert math.isclose(*(wide / high), rel_tol=0.03), fields


class TestPlaces:
    @pytest.mark.parametrize(
        ("image", "dataset"), [("deep/b.png", "cub"), ("c.png", "cub2"), ("d.png", "textcap"), ("cot/cub/deep/b.png", "x")]
    )
    def test_released_layouts(self, folder, image, dataset):
        assert read(folder, image=image, dataset=dataset).images

    @pytest.mark.parametrize("inner", ["cot", "cot/cub"])
    def test_the_folder_may_be_deeper(self, folder, inner):
        assert read(folder / inner, benchmark()).images

    def test_absolute_paths_inside(self, folder):
        assert read(folder, image=str(folder / "a.png")).images

    def test_links_inside(self, folder):
        link = folder / "link.png"
        link.symlink_to(folder.parent / "outside.png")
        assert read(folder, image="link.png").images

    @pytest.mark.parametrize("image", ["../outside.png", "cub/../../outside.png", "/etc/passwd", "cot/cub/../../../outside.png"])
    def test_nothing_outside(self, folder, image):
        assert refused(folder, image=image).reason == "image outside the folder"
        assert refused(folder, mask=image).reason == "mask outside the folder"

    def test_data_set_names_are_no_way_out(self, folder):
        assert refused(folder, image="outside.png", dataset="..").reason == "image missing"
        assert refused(folder, image="outside.png", dataset="../..").reason == "image missing"


REFUSALS = [
    ({"question": " \n"}, "empty question"),
    ({"answer": ""}, "empty answer"),
    ({"answer": None}, "field missing"),
    ({"question": None}, "field missing"),
    ({"image": None}, "field missing"),
    ({"image": []}, "field missing"),
    ({"image": [3]}, "field not text"),
    ({"image": "  "}, "field not text"),
    ({"answer": ["a", "b"]}, "field not text"),
    ({"answer": True}, "field not text"),
    ({"question": "\ud800"}, "field not text"),
    ({"images": ["a.png"]}, "fields clash"),
    ({"split": "all"}, "split name"),
    ({"split": "../x"}, "split name"),
    ({"box_format": "inches"}, "unknown box format"),
    ({"image": ["a.png", "square.png"]}, "counts disagree"),
    ({"mask": ["mask.png", "mask.png"]}, "counts disagree"),
    ({"image": "none.png"}, "image missing"),
    ({"image": "folder.jpg"}, "image missing"),
    ({"image": "a\0.png"}, "image missing"),
    ({"image": "\ud800.png"}, "image missing"),
    ({"image": "x" * 5000}, "image missing"),
    ({"image": "https://example.com/a.png"}, "image missing"),
    ({"image": "cut.jpg"}, "image broken"),
    ({"image": "text.jpg"}, "image broken"),
    ({"image": "empty.jpg"}, "image broken"),
    ({"image": "bomb.png"}, "image broken"),
    ({"width": 101, "height": 80}, "size disagrees"),
    ({"height": 81}, "size disagrees"),
    ({"width": 80, "height": 100}, "size disagrees"),
    ({"width": "100"}, "size not numbers"),
    ({"width": 99.5}, "size not numbers"),
    ({"boxes": None}, "no evidence"),
    ({"boxes": []}, "no evidence"),
    ({"boxes": [["10", 20, 60, 50]]}, "box not numbers"),
    ({"boxes": [[True, 20, 60, 50]]}, "box not numbers"),
    ({"boxes": [[float("nan"), 20, 60, 50]]}, "box not numbers"),
    ({"boxes": [[10, 20, 60, float("inf")]]}, "box not numbers"),
    ({"boxes": [[10, 20, 60, 10**400]]}, "box not numbers"),
    ({"boxes": [[10, 20, 60]]}, "box not numbers"),
    ({"boxes": {"x1": 3}}, "box not numbers"),
    ({"boxes": "10 20 60 50"}, "box not numbers"),
    ({"boxes": [[10, 20, 60, 50], 7]}, "box not numbers"),
    ({"boxes": [[60, 20, 10, 50]]}, "box empty"),
    ({"boxes": [[10, 20, 10, 50]]}, "box empty"),
    ({"boxes": [[100, 20, 101, 50]]}, "box empty"),
    ({"boxes": [[10, 20, 102, 50]]}, "box outside the picture"),
    ({"boxes": [[-2, 20, 60, 50]]}, "box outside the picture"),
    ({"boxes": [[100, 250, 600, 625]]}, "box outside the picture"),
    ({"boxes": [[10, 20, 60, 50]], "box_format": "normalized"}, "box outside the picture"),
    ({"boxes": [[10, 20, 60, 1050]], "box_format": "0-1000"}, "box outside the picture"),
    ({"boxes": [[0, 0, 1, 1]]}, "box format unclear"),
    ({"boxes": [[0.1, 0.2, 1.2, 0.9]]}, "box format unclear"),
    ({"boxes": [[0.1, 0.2, 0.8, 0.9], [10, 20, 60, 50]]}, "box format unclear"),
    ({"boxes": None, "mask": "none.png"}, "mask missing"),
    ({"boxes": None, "mask": "mask_broken.png"}, "mask broken"),
    ({"boxes": None, "mask": "mask_square.png"}, "mask size disagrees"),
    ({"boxes": None, "mask": "mask_ones.png"}, "mask empty"),
    ({"boxes": None, "mask": "mask_see_through.png"}, "mask transparent"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSALS, ids=[f"{reason}-{i}" for i, (_, reason) in enumerate(REFUSALS)])
def test_refusals(folder, changes, reason):
    boxes = changes.pop("boxes", BASE["boxes"])
    error = refused(folder, BASE | {"boxes": boxes}, **changes)
    assert error.reason == reason
    assert "\n" not in error.detail and str(folder) not in error.detail and error.detail.isprintable()


def test_bombs_are_not_decoded(folder):
    assert "more than the limit" in refused(folder, image="bomb.png").detail or "more pixels" in refused(folder, image="bomb.png").detail


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b'{"a": }', b"[" * 100_000, b"nothing"])
def test_not_json(data):
    with pytest.raises(BadRow) as caught:
        parse_row(data, "x", "y")
    assert caught.value.reason == "not JSON"


@pytest.mark.parametrize("data", [b"3", b"[]", b'"text"', b"null"])
def test_not_an_object(data):
    with pytest.raises(BadRow) as caught:
        parse_row(data, "x", "y")
    assert caught.value.reason == "not an object"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["a.png", "mask.png"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["from", "value"]), inner, max_size=2),
    max_leaves=8,
)
NAMES = [
    "image",
    "images",
    "question",
    "answer",
    "boxes",
    "bbox",
    "mask",
    "masks",
    "width",
    "height",
    "box_format",
    "split",
    "id",
    "conversations",
]


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6))
def test_no_row_crashes(folder, changes):
    try:
        read(folder, BASE | changes)
    except BadRow as error:
        assert error.reason


class TestBoxes:
    def test_slack_is_clipped(self, folder):
        assert read(folder, boxes=[[-1, 20, 101, 50]]).boxes[0][0][0::2] == (0.0, 1.0)

    def test_large_pictures_have_half_a_per_cent_of_slack(self, tmp_path):
        Image.new("L", (2000, 1000)).save(tmp_path / "a.png")
        assert read(tmp_path, boxes=[[10, 20, 2009, 1004]]).boxes[0][0][2:] == (1.0, 1.0)
        assert refused(tmp_path, boxes=[[10, 20, 2011, 1000]]).reason == "box outside the picture"

    @pytest.mark.parametrize("orientation", TO_UPRIGHT)
    def test_exif(self, orientation, tmp_path):
        """A box in the stored frame covers, upright, what was in it: checked on a picture that is white there."""
        stored = np.zeros((80, 100, 3), np.uint8)
        stored[16:40, 10:30] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            upright = np.asarray(open_image(image))[..., 0]
        sizes = {} if orientation < 5 else {"width": 100, "height": 80}
        box = [10, 16, 30, 40]
        if orientation < 5:  # both frames have the same size, so the row means the upright picture
            rows, columns = np.nonzero(upright)
            box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        x1, y1, x2, y2 = read(tmp_path, boxes=[box], **sizes).boxes[0][0]
        height, width = upright.shape
        seen = upright[round(y1 * height) : round(y2 * height), round(x1 * width) : round(x2 * width)]
        assert seen.all() and seen.size == (upright > 0).sum()

    def test_exif_with_upright_sizes(self, folder):
        record = read(folder, image="turned6.jpg", boxes=[[8, 10, 40, 50]], width=80, height=100)
        np.testing.assert_allclose(record.boxes, [[[0.1, 0.1, 0.5, 0.5]]], rtol=1e-6)
        record = read(folder, image="turned6.jpg", boxes=[[8, 10, 40, 50]])
        np.testing.assert_allclose(record.boxes, [[[0.1, 0.1, 0.5, 0.5]]], rtol=1e-6)


class TestSources:
    def rows(self, path: Path, size: int = 100) -> list[tuple[str, dict]]:
        pieces, _ = scan(find_files([path]))
        return [(where, json.loads(data.decode("utf-8-sig"))["n"]) for chunk in cut(pieces, size) for where, _, data in chunk.read()]

    @pytest.mark.parametrize("size", [1, 2, 100])
    def test_lines_and_lists(self, tmp_path, size):
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": "\xc3\xa9"}\r\n\r\n  \n{"n": 2}\n{"n": 3}')
        (tmp_path / "b.json").write_bytes('\ufeff [\n {"n": "é€😀"},{"n": [5]}\r\n,\n{"n": 6}]\n'.encode())
        expected = [("a.jsonl:1", "é"), ("a.jsonl:4", 2), ("a.jsonl:5", 3), ("b.json#1", "é€😀"), ("b.json#2", [5]), ("b.json#3", 6)]
        assert self.rows(tmp_path, size) == expected

    def test_a_first_line_that_looks_like_a_list(self, tmp_path):
        for first in (b"[1, 2]", b"[broken"):
            (tmp_path / "a.jsonl").write_bytes(first + b'\n{"n": 2}\n')
            pieces, _ = scan([tmp_path / "a.jsonl"])
            assert [where for chunk in cut(pieces, 9) for where, _, _ in chunk.read()] == ["a.jsonl:1", "a.jsonl:2"]

    def test_released_lists_are_cut_exactly(self, shared):
        path = shared / "visual_cot" / "benchmark" / "gqa.json"
        pieces, _ = scan([path])
        assert [json.loads(data) for chunk in cut(pieces, 7) for _, _, data in chunk.read()] == json.loads(path.read_text())

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "no readable row"),
            (b"\n\n", "no readable row"),
            (b"[]", "no readable row"),
            (b"hello\nworld\n", "no readable row"),
            ('{"n": 1}\n'.encode("utf-16"), "no readable row"),
            (b'[{"n": 1}, {"n"', "cut off"),
            (b'[{"n": 1} {"n": 2}]', "cut off"),
            (b'[{"n": "\xff"}]', "UTF-8"),
            (b'[{"n": 1}] x', "cut off"),
        ],
    )
    def test_unreadable_files(self, tmp_path, content, message):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(GlimpseError, match=message):
            scan(find_files([tmp_path / "a.json"]))

    def test_what_is_not_there(self, tmp_path):
        for source, message in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "has no .jsonl or .json")):
            with pytest.raises(GlimpseError, match=message):
                find_files([source])
        (tmp_path / "a.jsonl").write_text("{}")
        with pytest.raises(GlimpseError, match="twice"):
            find_files([tmp_path, tmp_path / "a.jsonl"])

    def test_same_names_stay_apart(self, tmp_path):
        for name in ("x", "y"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.jsonl").write_text("{}")
        pieces, _ = scan(find_files([tmp_path / "x", tmp_path / "y"]))
        assert len({piece.label for piece in pieces}) == 2
