"""Pictures of rows: where they are found, which way up they are for boxes and sizes, and what one stage accepts all later ones read."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from gp_jax.data.builder import decode, encode
from gp_jax.data.checks import TO_UPRIGHT, Checker, upright_size
from gp_jax.data.formats import BadRow, parse_row
from gp_jax.evaluation.annotations import Annotations
from gp_jax.processing.images import decode as decode_picture

pytestmark = pytest.mark.quick

ROW = {"image": "a.tif", "question": "Which?", "answer": "this", "boxes": [[10, 16, 30, 40]]}
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="{}"/></x:xmpmeta>'


def read(folder, **changes):
    return Checker(folder).check(parse_row(json.dumps(ROW | changes).encode(), "row:1", "rows"))


@pytest.mark.parametrize("where", ["tag", "XMP", "JPEG with XMP", "late in a PNG"])
@pytest.mark.parametrize("orientation", [6, 7, 3])
def test_boxes_are_turned_with_the_picture(tmp_path, orientation, where):
    """A row of the stored size speaks of the stored picture; its box covers, upright, what was in it."""
    stored = np.zeros((80, 100, 3), np.uint8)
    stored[16:40, 10:30] = 255
    picture, xmp = Image.fromarray(stored), XMP.format(orientation).encode()
    name = {"tag": "a.tif", "XMP": "a.tif", "JPEG with XMP": "a.jpg", "late in a PNG": "a.png"}[where]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tag": {"tiffinfo": {0x0112: orientation}}, "XMP": {"tiffinfo": {700: xmp}}, "JPEG with XMP": {"xmp": xmp, "quality": 95}}
    picture.save(tmp_path / name, **options.get(where, {"exif": exif}))
    if where == "late in a PNG":
        data = (tmp_path / name).read_bytes()
        start, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
        (tmp_path / name).write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    sizes = {"width": 100, "height": 80} if orientation >= 5 else {}
    record, (size,) = read(tmp_path, image=name, **sizes)
    upright = np.asarray(decode_picture(record.images[0], "x"))[..., 0] > 128
    assert size == upright.shape[::-1] == upright_size(tmp_path / name)
    if orientation >= 5:
        x1, y1, x2, y2 = record.boxes[0][0]
        seen = upright[round(y1 * size[1]) : round(y2 * size[1]), round(x1 * size[0]) : round(x2 * size[0])]
        assert seen.all() and seen.size == upright.sum()
    again, sizes = decode(encode(record, [size]))
    assert sizes == (size,) and again.images == record.images
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"image": name}) + "\n")
    found = Annotations([tmp_path / "rows.jsonl"], tmp_path, 10)
    assert found.entries[0].sizes == (size,) and TO_UPRIGHT[orientation]


@pytest.mark.parametrize("there, asked", [("NFC", "NFD"), ("NFD", "NFC")])
def test_pictures_are_found_in_either_spelling(tmp_path, there, asked):
    spelled, name = unicodedata.normalize(there, "f\u00f6to.png"), unicodedata.normalize(asked, "f\u00f6to.png")
    for place in (tmp_path / "cot" / "cub", tmp_path / "plain"):
        place.mkdir(parents=True)
        Image.new("RGB", (100, 80)).save(place / spelled)
    assert read(tmp_path, image=name, dataset="cub")[1] == read(tmp_path / "plain", image=name)[1] == ((100, 80),)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"image": name, "dataset": "cub"}) + "\n")
    assert len(Annotations([tmp_path / "rows.jsonl"], tmp_path, 10)) == 1


def test_what_is_no_picture_is_a_bad_row(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "holes.png").open("wb") as file:
        file.truncate(1 << 40)
    Image.effect_noise((9, 9), 50).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    (tmp_path / "large.bmp").write_bytes(b"BM" + bytes(12) + (40).to_bytes(4, "little") + (10**5).to_bytes(4, "little") * 2 + bytes(28))
    for name, detail in (
        ("pipe.png", "is not a regular file"),
        ("holes.png", "is larger than"),
        ("cut.png", "is truncated or damaged"),
        ("large.bmp", "truncated or damaged|more than the limit"),
    ):
        with pytest.raises(BadRow, match=f"image broken.*({detail})") as error:
            read(tmp_path, image=name)
        assert error.value.detail.startswith(f"{name}: ") and str(tmp_path) not in error.value.detail
        if name != "cut.png":
            with pytest.raises(BadRow, match="image broken"):
                upright_size(tmp_path / name)


def test_masks_of_unusual_greys(tmp_path):
    """They are read as pictures are, and the later stage sees the same."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    white = np.zeros((10, 20), np.int32)
    white[2:5, 3:9] = 255
    Image.fromarray(white).save(tmp_path / "mask.tif")
    record, _ = read(tmp_path, image="a.png", boxes=[], mask="mask.tif")
    np.testing.assert_array_equal(np.asarray(decode_picture(record.masks[0], "x").convert("L")), white)
    clear = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    clear.save(tmp_path / "mask.png")
    with pytest.raises(BadRow, match="mask transparent"):
        read(tmp_path, image="a.png", boxes=[], mask="mask.png")
