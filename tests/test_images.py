"""Pictures from strangers: every bad one is one clear line, before pixels are decoded where it matters."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gp_jax import GlimpseError
from gp_jax.images import open_image, overlay, side_by_side


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
    assert open_image(photo, max_pixels=4800).size == (80, 60)
    with pytest.raises(GlimpseError, match="80 x 60 pixels are more than the limit of 4799"):
        open_image(photo, max_pixels=4799)


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


def test_overlay_dims_what_was_dropped():
    image = Image.fromarray(np.full((30, 40, 3), (200, 100, 50), np.uint8))
    keep = np.zeros((3, 4), bool)
    keep[1, 2] = True
    shown = np.asarray(overlay(image, keep))
    np.testing.assert_array_equal(shown[10:20, 20:30], np.asarray(image)[10:20, 20:30])
    assert shown[:10].max() < 120 and shown.shape == (30, 40, 3)
    assert side_by_side([image, image.resize((20, 20))]).size == (27 + 8 + 20, 20)
