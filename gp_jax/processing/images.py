"""Opening untrusted pictures: limits are checked on the header, before pixels are decoded.

A picture's size is always that of the upright picture (`read_picture`), also before it is decoded.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, cast

import numpy as np
from PIL import Image
from pydantic import Field

from gp_jax.config.schema import FromNumpy, one
from gp_jax.errors import GlimpseError, one_line, printable
from gp_jax.processing.addresses import fetch, is_address, shown_address
from gp_jax.processing.encoded import SIDEWAYS, UPRIGHT, formats, open_encoded
from gp_jax.runtime.disk import read_bytes, spelled

MAX_PIXELS = 100_000_000  # of one picture, before decoding
MAX_ASPECT = 200  # Qwen2.5-VL's own limit
MAX_BYTES = 256 << 20  # of one file, or more if its pixels may need it
PIXEL_BYTES = 8  # of the largest pixel, four channels of 16 bits
BAND = 1 << 22  # pixels that are converted at a time

Limit = Annotated[float, Field(ge=0), FromNumpy]
ImageLike = str | os.PathLike | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray


def check_size(size: tuple[int, int], name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raises: GlimpseError for a picture that is too large, too long or empty. size: (width, height)."""
    width, height = size
    if width * height > max_pixels:
        raise GlimpseError(f"{name}: {width} x {height} pixels are more than the limit of {max_pixels} (max_image_pixels)")
    if min(size) < 1:
        raise GlimpseError(f"{name}: {width} x {height} pixels are an empty picture")
    if max(size) > MAX_ASPECT * min(size):
        raise GlimpseError(f"{name}: {width} x {height} pixels are too extreme an aspect ratio (at most {MAX_ASPECT}:1)")


@dataclass(frozen=True)
class EncodedPicture:
    """An encoded picture with its header read. stored: as it is in the file; orientation: EXIF's number, 1 for upright."""

    name: str
    stored: Image.Image
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        return self.stored.size[::-1] if self.orientation in SIDEWAYS else self.stored.size

    def rgb(self) -> Image.Image:
        """The upright picture; transparent parts become white. Raises: GlimpseError when it does not decode."""
        size = self.stored.size
        with _within_memory(self.name):
            # Pillow checks its global limit when it allocates the pixels of a TIFF; allocated here, they are not checked.
            if self.stored.format == "TIFF" and getattr(self.stored, "tile", None):
                self.stored.im = Image.new(self.stored.mode, size, None).im
            picture = _rgb(self.stored, self.name)
            if picture.size != size:
                raise GlimpseError(f"{self.name}: is damaged (its header says {size}, its pixels are {picture.size})")
            return picture.transpose(UPRIGHT[self.orientation]) if self.orientation in UPRIGHT else picture


def read_picture(source: bytes | Path, name: str | None = None, max_pixels: int = MAX_PIXELS) -> EncodedPicture:
    """Reads the header of an encoded picture or file. name: for messages; None: the file. Raises: GlimpseError that names it."""
    name = printable(source, 300) if name is None else name
    with _within_memory(name):
        data = read_bytes(source, max(MAX_BYTES, PIXEL_BYTES * max_pixels)) if isinstance(source, Path) else source
    try:
        opened = open_encoded(data)
    except Image.DecompressionBombError as error:
        raise GlimpseError(f"{name}: has more pixels than twice Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:  # Pillow's plugins raise any type of error for a damaged header
        raise GlimpseError(f"{name}: is truncated or damaged ({one_line(error)})") from error
    if opened is None:
        raise GlimpseError(f"{name}: is not an image in a known format ({', '.join(formats())})")
    picture = EncodedPicture(name, *opened)
    check_size(picture.size, name, max_pixels)
    return picture


def decode(encoded: bytes, name: str) -> Image.Image:
    """An encoded picture as upright RGB. Raises: GlimpseError with this name."""
    return read_picture(encoded, name).rgb()


def open_image(source: ImageLike, max_pixels: int = MAX_PIXELS, name: str = "image") -> Image.Image:
    """A picture as upright RGB; transparent parts become white.

    Args: source: a path, an address (http or https), the bytes of a file, a file that is open for reading them, a PIL image, or an array
        (rows, columns[, 1, 3 or 4]), uint8 or float in 0..1.
    Raises: GlimpseError that names the file.
    """
    max_pixels = int(one(Limit, max_pixels, "max_image_pixels"))
    most = max(MAX_BYTES, PIXEL_BYTES * max_pixels)
    if isinstance(source, str) and is_address(source):
        return read_picture(fetch(source, most), shown_address(source), max_pixels).rgb()
    if isinstance(source, bytes | bytearray | memoryview):
        return read_picture(_bounded(bytes(source), most, name), name, max_pixels).rgb()
    if not isinstance(source, Image.Image) and callable(getattr(source, "read", None)):
        return read_picture(read_open(cast(IO[bytes], source), most, name), name, max_pixels).rgb()
    if isinstance(source, str | os.PathLike):
        return read_picture(spelled(source), max_pixels=max_pixels).rgb()
    with _within_memory(name):
        if not isinstance(source, Image.Image):
            return _rgb(_from_array(source, name, max_pixels), name)
        check_size(source.size, name, max_pixels)
        picture = _rgb(source, name)
        try:
            turned = UPRIGHT.get(source.getexif().get(0x0112, 1))
        except Exception:  # tags that Pillow cannot read
            turned = None
        return picture.copy() if turned is None else picture.transpose(turned)


def read_open(file: IO[bytes], most: int, name: str) -> bytes:
    """All of an open file. most: bytes. Raises: GlimpseError when it is longer, empty, or open for text."""
    try:
        with _within_memory(name):
            content = file.read(most + 1)
    except GlimpseError:
        raise
    except Exception as error:  # a file of any kind
        raise GlimpseError(f"{name}: cannot be read ({one_line(error)})") from error
    if not isinstance(content, bytes):
        raise GlimpseError(f"{name}: is open for text, not for bytes")
    if not content:
        raise GlimpseError(f"{name}: is empty (a file that was read to its end?)")
    return _bounded(content, most, name)


def _bounded(content: bytes, most: int, name: str) -> bytes:
    if len(content) > most:
        raise GlimpseError(f"{name}: is larger than {most >> 10} KiB")
    return content


@contextlib.contextmanager
def _within_memory(name: str) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise GlimpseError(f"{name}: there is not enough memory for a picture of this size") from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Decodes a picture and converts it to RGB, without rotating it."""
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise any type of error for damaged pixels
        raise GlimpseError(f"{name}: is truncated or damaged ({one_line(error)})") from error
    if image.mode == "F":
        raise GlimpseError(f"{name}: a floating point picture has no known range of brightness")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # older versions of Pillow open 16-bit files of these formats as 32 bits
        least, most = cast(tuple[int, int], image.getextrema())  # a picture of mode I has one channel
        if least < 0 or most > 255:
            raise GlimpseError(f"{name}: integers of 32 bits ({least} to {most}) have no known range of brightness")
        image = image.convert("L")
    try:
        if image.mode.startswith("I"):
            return _in_bands(image, functools.partial(_scaled, tags=getattr(image, "tag_v2", {})))
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            return _in_bands(image, _on_white)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # modes that Pillow does not convert
        raise GlimpseError(f"{name}: colours of mode {image.mode} cannot become RGB ({one_line(error)})") from error


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Converts to RGB in bands of rows, because the conversion needs several times the memory of its input."""
    made, rows = Image.new("RGB", image.size, None), max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        made.paste(convert(image.crop(box)), box)
    return made


def _scaled(grey: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """16-bit brightness scaled to 8 bits (Pillow's own conversion clips). tags: of a TIFF file, e.g. 12 bits, or 0 for white."""
    values = np.asarray(grey).astype(np.int64)
    most = 4095 if tags.get(258) in (12, (12,)) else 65535
    scaled = values.clip(0, most) * 255 // most
    scaled = 255 - scaled if tags.get(262) == 0 else scaled
    clear = grey.info.get("transparency")
    return Image.fromarray(np.where(values == clear, 255, scaled).astype(np.uint8) if isinstance(clear, int) else scaled.astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def _from_array(source: object, name: str, max_pixels: int) -> Image.Image:
    try:
        found = hasattr(source, "__array__") and np.asarray(source)
    except Exception as error:  # raised by an object that claims to be an array
        raise GlimpseError(f"{name}: a {type(source).__name__} cannot be read as an array ({one_line(error)})") from error
    if not isinstance(found, np.ndarray):
        raise GlimpseError(f"{name}: a {type(source).__name__} is not a path, address, file, PIL image or array")
    array = found[..., 0] if found.ndim == 3 and found.shape[2] == 1 else found
    if found.ndim not in (2, 3) or (found.ndim == 3 and found.shape[2] not in (1, 3, 4)) or found.size == 0:
        raise GlimpseError(f"{name}: an array of shape {found.shape} is not (rows, columns) or (rows, columns, 1, 3 or 4)")
    check_size((found.shape[1], found.shape[0]), name, max_pixels)
    if np.ma.is_masked(source):
        raise GlimpseError(f"{name}: parts of the array are masked, and what they show is not known")
    if not np.issubdtype(array.dtype, np.floating):
        if array.dtype != np.uint8:
            raise GlimpseError(f"{name}: an array of {printable(array.dtype, 60)} is not uint8 or float")
        return Image.fromarray(array)
    pixels, rows = np.empty(array.shape, np.uint8), max(1, BAND // found.shape[1])
    for top in range(0, len(array), rows):  # in bands, because the conversion needs several times the memory of its input
        part = array[top : top + rows]
        if not np.isfinite(part).all() or part.min() < 0 or part.max() > 1:
            raise GlimpseError(f"{name}: a float array must hold values in 0..1")
        pixels[top : top + rows] = np.round(part * 255)
    return Image.fromarray(pixels)


def overlay(image: Image.Image, keep: np.ndarray, dim: float = 0.35) -> Image.Image:
    """The picture with dropped tokens greyed and dimmed; all of it if it has no visual tokens.

    Args: keep: (rows, columns) bool over the picture's token grid; dim: remaining brightness of dropped parts.
    """
    rows, columns = keep.shape
    pixels = np.asarray(image, np.float32)
    kept = np.zeros((*pixels.shape[:2], 1), bool)
    if kept.size and keep.size:
        row = np.minimum(np.arange(image.height) * rows // image.height, rows - 1)
        column = np.minimum(np.arange(image.width) * columns // image.width, columns - 1)
        kept = keep[row][:, column][..., None]
    grey = pixels.mean(axis=-1, keepdims=True)
    dropped = dim * (0.7 * grey + 0.3 * pixels) + (1 - dim) * 24
    return Image.fromarray(np.where(kept, pixels, dropped).astype(np.uint8))


def side_by_side(images: Sequence[Image.Image], height: int | None = None, gap: int = 8) -> Image.Image:
    """Several pictures in a row, scaled to one height (default: the smallest). Empty ones are left out.

    Raises: GlimpseError when none is left.
    """
    images = [image for image in images if min(image.size) > 0]
    if not images:
        raise GlimpseError("there is no picture to put beside another")
    height = height or min(image.height for image in images)
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    sheet = Image.new("RGB", (sum(i.width for i in scaled) + gap * (len(scaled) - 1), height), "white")
    left = 0
    for image in scaled:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet
