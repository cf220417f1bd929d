"""Opening pictures from strangers: limits are checked on the header, before a single pixel is decoded."""

import functools
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gp_jax.errors import GlimpseError

MAX_PIXELS = 100_000_000  # of one picture, before decoding
MIN_SIDE = 2
MAX_ASPECT = 200  # Qwen2.5-VL's own limit

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no format that runs programs or decodes on opening

ImageLike = str | os.PathLike | Image.Image | np.ndarray


def check_size(size: tuple[int, int], name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raises: GlimpseError for a picture that is too large, too small or too long. size: (width, height)."""
    width, height = size
    if width * height > max_pixels:
        raise GlimpseError(f"{name}: {width} x {height} pixels are more than the limit of {max_pixels} (max_image_pixels)")
    if min(size) < MIN_SIDE:
        raise GlimpseError(f"{name}: {width} x {height} pixels are too few, each side needs {MIN_SIDE}")
    if max(size) > MAX_ASPECT * min(size):
        raise GlimpseError(f"{name}: {width} x {height} pixels are too extreme an aspect ratio (at most {MAX_ASPECT}:1)")


def open_image(source: ImageLike, max_pixels: int = MAX_PIXELS, name: str = "image") -> Image.Image:
    """A picture as upright RGB; transparent parts become white.

    Args: source: a path, a PIL image, or an array (rows, columns[, 1, 3 or 4]), uint8 or float in 0..1.
    Raises: GlimpseError that names the file.
    """
    if isinstance(source, str | os.PathLike):
        return _open_file(Path(source), max_pixels)
    if isinstance(source, np.ndarray) or (hasattr(source, "__array__") and not isinstance(source, Image.Image)):
        source = _from_array(np.asarray(source), name)
    if not isinstance(source, Image.Image):
        raise GlimpseError(f"{name}: a {type(source).__name__} is not a path, PIL image or array")
    return _checked_rgb(source, name, max_pixels)


def decode(encoded: bytes, name: str) -> Image.Image:
    """An encoded picture as upright RGB. Raises: GlimpseError with this name."""
    try:
        picture = Image.open(io.BytesIO(encoded), formats=formats())
    except Exception as error:  # Pillow's plugins raise whatever a damaged header makes them
        raise GlimpseError(f"{name}: is not a readable image") from error
    return open_image(picture, name=name)


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open_file(path: Path, max_pixels: int) -> Image.Image:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise GlimpseError(f"{str(path)[:80]}: is not a path ({type(error).__name__})") from error
    if is_folder or not exists:
        raise GlimpseError(f"{path}: is a folder, not an image" if is_folder else f"{path}: no such file")
    # Pillow's own guard is a global that warns or raises by its own numbers; ours, checked on the header, replaces it upwards.
    theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max(max_pixels, Image.MAX_IMAGE_PIXELS or 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=formats())
    except Image.DecompressionBombError as error:
        raise GlimpseError(f"{path}: has more pixels than the limit of {max_pixels} (max_image_pixels)") from error
    except UnidentifiedImageError as error:
        raise GlimpseError(f"{path}: is not an image in a known format ({', '.join(formats())})") from error
    except Exception as error:  # Pillow's plugins raise whatever a damaged header makes them
        raise GlimpseError(f"{path}: is truncated or damaged ({' '.join(str(error).split())})") from error
    finally:
        Image.MAX_IMAGE_PIXELS = theirs
    with image:
        return _checked_rgb(image, str(path), max_pixels)


def _checked_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Checks the size, then decodes."""
    check_size(image.size, name, max_pixels)
    try:
        return _upright_rgb(image, name)
    except GlimpseError:
        raise
    except Exception as error:  # as above, from decoders
        raise GlimpseError(f"{name}: is truncated or damaged ({' '.join(str(error).split())})") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise GlimpseError(f"{name}: a floating point picture has no known range of brightness")
    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow's own conversion would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or array.size == 0:
        raise GlimpseError(f"{name}: an array of shape {array.shape} is not (rows, columns) or (rows, columns, 1, 3 or 4)")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise GlimpseError(f"{name}: a float array must hold values in 0..1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise GlimpseError(f"{name}: an array of {array.dtype} is not uint8 or float")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def overlay(image: Image.Image, keep: np.ndarray, dim: float = 0.35) -> Image.Image:
    """The picture with what was dropped greyed and dimmed.

    Args: keep: (rows, columns) bool over the picture's token grid; dim: brightness left to dropped parts.
    """
    rows, columns = keep.shape
    row = np.minimum(np.arange(image.height) * rows // image.height, rows - 1)
    column = np.minimum(np.arange(image.width) * columns // image.width, columns - 1)
    kept = keep[row][:, column][..., None]
    pixels = np.asarray(image, np.float32)
    grey = pixels.mean(axis=-1, keepdims=True)
    dropped = dim * (0.7 * grey + 0.3 * pixels) + (1 - dim) * 24
    return Image.fromarray(np.where(kept, pixels, dropped).astype(np.uint8))


def side_by_side(images: Sequence[Image.Image], height: int | None = None, gap: int = 8) -> Image.Image:
    """Several pictures in a row, scaled to one height (default: the smallest)."""
    height = height or min(image.height for image in images)
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    sheet = Image.new("RGB", (sum(i.width for i in scaled) + gap * (len(scaled) - 1), height), "white")
    left = 0
    for image in scaled:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet
