"""Pictures from strangers: every bad one is one clear line, before pixels are decoded where it matters."""

import os
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from gp_jax import GlimpseError
from gp_jax.processing import images
from gp_jax.processing.images import decode, open_image, overlay, side_by_side

pytestmark = pytest.mark.quick


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_errors_name_the_file(tmp_path, photo):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:3000])
    Image.open(photo).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    (tmp_path / "big.png").write_bytes(png_header(12000, 10000))
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n")  # PostScript is a program
    (tmp_path / "long.png").write_bytes(png_header(5000, 3))
    Image.new("RGB", (1, 201)).save(tmp_path / "thin.png")
    for name, message in {
        "nothing.png": "file is missing",
        "text.jpg": "is not an image",
        "empty.jpg": "is not an image",
        "cut.png": "is truncated or damaged",
        "cut.jpg": "is truncated or damaged",
        "bomb.png": "60000 x 60000 pixels are more than the limit of 100000000",
        "big.png": "12000 x 10000 pixels are more than the limit of 100000000",
        "page.png": "is not an image in a known format",
        "long.png": "too extreme an aspect ratio",
        "thin.png": "pixels are too extreme an aspect ratio",
    }.items():
        with pytest.raises(GlimpseError) as error:
            open_image(tmp_path / name)
        assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(GlimpseError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(GlimpseError, match="is not a path"):
        open_image("x" * 5000)
    with pytest.raises(GlimpseError, match="is truncated or damaged"):
        open_image(Image.open(tmp_path / "cut.jpg"))


def test_limit_is_a_setting(photo):
    assert all(open_image(photo, max_pixels=limit).size == (80, 60) for limit in (4800, 1e8, 10**11))
    with pytest.raises(GlimpseError, match="80 x 60 pixels are more than the limit of 4799"):
        open_image(photo, max_pixels=4799)
    for wrong in (float("nan"), "4800", None, True, -1):
        with pytest.raises(GlimpseError, match="max_image_pixels="):
            open_image(photo, max_pixels=wrong)


def test_modes_become_upright_rgb(tmp_path):
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255), "transparent is white"
    assert open_image(Image.new("L", (10, 10), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert open_image(Image.new("P", (10, 10))).mode == "RGB"
    grey = Image.fromarray(np.full((10, 10), 127 * 257, np.uint16))
    assert open_image(grey).getpixel((0, 0)) == (127, 127, 127), "16 bits are scaled, not clipped"
    with pytest.raises(GlimpseError, match="floating point"):
        open_image(Image.new("F", (10, 10)))
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20), "as the camera meant it"


def test_arrays():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    np.testing.assert_array_equal(open_image(pixels), pixels)
    assert np.abs(np.asarray(open_image(pixels / 255.0), int) - pixels).max() == 0
    assert open_image(pixels[..., :1]).size == (8, 6)
    for bad, message in ((pixels.astype(np.int64), "int64"), (pixels / 100.0, "0..1"), (pixels[None], "shape"), (3, "not a path")):
        with pytest.raises(GlimpseError, match=message):
            open_image(bad)


def test_one_pixel_is_enough(tmp_path):
    for size in ((40, 1), (1, 40), (1, 1), (200, 1)):
        Image.new("RGB", size).save(tmp_path / "line.png")
        assert open_image(tmp_path / "line.png").size == open_image(np.zeros(size[::-1])).size == size
    for empty in (Image.new("RGB", (0, 5)), Image.Image()):
        with pytest.raises(GlimpseError, match="are an empty picture"):
            open_image(empty)


def test_only_files_are_opened(tmp_path):
    """Not what would wait for ever, or never end."""
    os.mkfifo(tmp_path / "photo.png")
    with (tmp_path / "holes.png").open("wb") as file:
        file.truncate(1 << 40)
    for source, message in (
        (tmp_path / "photo.png", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        (tmp_path / "holes.png", "is larger than"),
        ("a\0b", "is not a path"),
        ("\ud800", "is not a path"),
        ("a\nb\x1b.png", r"^a\\nb\\x1b.png: file is missing$"),
    ):
        with pytest.raises(GlimpseError, match=message):
            open_image(source)


@pytest.mark.parametrize("there, asked", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_spelling(tmp_path, there, asked):
    name = "Qu\u00e9bec/f\u00f6to \u1100\u1161.png"
    path = tmp_path / unicodedata.normalize(there, name)
    path.parent.mkdir()
    Image.new("RGB", (4, 3)).save(path)
    assert open_image(tmp_path / unicodedata.normalize(asked, name)).size == (4, 3)
    assert open_image(tmp_path / unicodedata.normalize(asked, name.split("/")[0]) / path.name).size == (4, 3), "a part of each"
    with pytest.raises(GlimpseError, match="file is missing"):
        open_image(tmp_path / unicodedata.normalize(asked, name + "x"))


def test_brightness_of_known_range_only(tmp_path):
    """Integers of 32 bits are read as Pillow converts them, or refused; 12 bits, and white that is 0, are what a TIFF says they are."""
    ramp = np.arange(0, 250, dtype=np.int32).reshape(10, 25)
    Image.fromarray(ramp).save(tmp_path / "grey.tif")
    for source in (tmp_path / "grey.tif", Image.fromarray(ramp), Image.open(tmp_path / "grey.tif")):
        np.testing.assert_array_equal(np.asarray(open_image(source))[..., 1], ramp)
    for values in (ramp - 1, ramp + 7, ramp * 4, ramp * 2**20):
        Image.fromarray(values.astype(np.int32)).save(tmp_path / "other.tif")
        for source in (tmp_path / "other.tif", Image.fromarray(values.astype(np.int32))):
            with pytest.raises(GlimpseError, match="integers of 32 bits .* have no known range of brightness"):
                open_image(source)
    deep = (np.arange(250, dtype=np.uint16) * 257).reshape(10, 25)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / name))[..., 1], ramp)
    data = (tmp_path / "deep.tif").read_bytes()
    inverted = data.replace(struct.pack("<HHLH", 262, 3, 1, 1), struct.pack("<HHLH", 262, 3, 1, 0))
    assert inverted != data
    np.testing.assert_array_equal(np.asarray(decode(inverted, "x"))[..., 1], 255 - ramp)
    packed = np.frombuffer(bytes([0xFF, 0xF8, 0x00]), np.uint8)  # two pixels of 12 bits: 4095 and 2048
    twelve = data.replace(struct.pack("<HHLH", 258, 3, 1, 16), struct.pack("<HHLH", 258, 3, 1, 12))
    twelve = twelve.replace(deep.astype("<u2").tobytes(), np.tile(packed, 167)[:500].tobytes())
    assert np.asarray(decode(twelve, "x"))[0, :4, 0].tolist() == [255, 127, 255, 127]


class Raises:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("on\nanother device")


def test_arrays_are_checked_before_they_are_copied():
    masked = np.ma.masked_array(np.zeros((5, 5)), mask=np.eye(5))
    for source, message in (
        (Raises(), r"a Raises cannot be read as an array \(on another device\)"),
        (np.broadcast_to(np.float32(0.5), (10**5, 10**5)), "100000 x 100000 pixels are more than the limit"),
        (np.broadcast_to(np.uint8(5), (10**5, 10**5, 3)), "100000 x 100000 pixels are more than the limit"),
        (np.zeros((5, 5), np.int32), "an array of int32 is not uint8 or float"),
        (np.zeros((5, 5), complex), "an array of complex128"),
        (np.zeros((5, 5), object), "an array of object"),
        (np.full((5, 5), "x"), "an array of <U1"),
        (np.zeros((5, 5), [("a", int)]), "an array of "),
        (np.array(5), "shape"),
        (np.zeros((5, 0)), "shape"),
        (np.full((5, 5), np.nan), "0..1"),
        (masked, "masked"),
    ):
        with pytest.raises(GlimpseError, match=message) as error:
            open_image(source)
        assert "\n" not in str(error.value)
    assert open_image(np.ma.masked_array(np.zeros((5, 4)))).size == (4, 5)
    ramp = np.linspace(0, 1, 40 * 30 * 3).reshape(40, 30, 3)
    np.testing.assert_array_equal(open_image(ramp[::-1, ::-1]), np.round(ramp * 255).astype(np.uint8)[::-1, ::-1])


def test_conversions_in_bands_are_the_whole_conversion(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 4), np.uint8)
    clear = Image.fromarray(pixels)
    palette = clear.convert("RGB").quantize(9)
    palette.info["transparency"] = bytes(range(0, 255, 29))
    cut = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    cut.info["transparency"] = cut.getpixel((0, 0))
    sources = (clear, clear.convert("LA"), palette, cut, pixels / 255.0)
    whole = [np.asarray(open_image(source)) for source in sources]
    monkeypatch.setattr(images, "BAND", 50)
    for source, want in zip(sources, whole, strict=True):
        np.testing.assert_array_equal(open_image(source), want)
    assert whole[3][0, 0].tolist() == [255] * 3, "also a transparent value of 16 bits is white"


def test_overlay_dims_what_was_dropped():
    image = Image.fromarray(np.full((30, 40, 3), (200, 100, 50), np.uint8))
    keep = np.zeros((3, 4), bool)
    keep[1, 2] = True
    shown = np.asarray(overlay(image, keep))
    np.testing.assert_array_equal(shown[10:20, 20:30], np.asarray(image)[10:20, 20:30])
    assert shown[:10].max() < 120 and shown.shape == (30, 40, 3)
    assert side_by_side([image, image.resize((20, 20))]).size == (27 + 8 + 20, 20)


def test_views_that_show_nothing():
    """LLaVA-NeXT's detail of a line has no visual tokens, or no pixels."""
    image = Image.new("RGB", (40, 1), "white")
    for keep in (np.ones((0, 8), bool), np.ones((4, 0), bool)):
        assert np.asarray(overlay(image, keep)).max() < 120, "nothing of it is kept"
    empty = overlay(Image.new("RGB", (40, 0)), np.ones((0, 8), bool))
    assert empty.size == (40, 0) and overlay(Image.new("RGB", (1, 1), "white"), np.ones((4, 4), bool)).getpixel((0, 0)) == (255,) * 3
    assert side_by_side([empty, image, image]).size == (40 + 8 + 40, 1)
    for nothing in ([], [empty]):
        with pytest.raises(GlimpseError, match="no picture"):
            side_by_side(nothing)
