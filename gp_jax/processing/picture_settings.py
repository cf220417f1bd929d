"""A model folder's settings of its image processor: read from where transformers reads them, and checked before use."""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from PIL import Image
from pydantic import Field

from gp_jax.config.schema import checked
from gp_jax.errors import GlimpseError, one_line, shown
from gp_jax.processing.library import broken, load_class
from gp_jax.runtime.disk import kind_of, read_json

OWN, SHARED = "preprocessor_config.json", "processor_config.json"
MOST_PIXELS = 1 << 25  # pixels of a resized picture: 42,800 visual tokens of Qwen2.5-VL
MOST_AT_LEAST = 1 << 21  # pixels to which a small picture may be enlarged
QWEN, CLIP, TILES = (  # transformers' picture processors without torch, by module and class
    ("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
    ("transformers.models.llava.image_processing_pil_llava", "LlavaImageProcessorPil"),
    ("transformers.models.llava_next.image_processing_pil_llava_next", "LlavaNextImageProcessorPil"),
)

Switch = bool | None
Value = Annotated[float, Field(ge=-1e4, le=1e4)]
Spread = Annotated[float, Field(ge=1e-6, le=1e4)]
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
Side = Annotated[int, Field(ge=1, le=2048)]
Sides = dict[Literal["shortest_edge", "longest_edge", "height", "width"], Side]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Settings of both families. Missing ones have the defaults of transformers' class; null turns a step off."""

    do_convert_rgb: Switch = None
    do_resize: Switch = None
    resample: Annotated[int, Field(ge=0, le=5)] | None = None  # as Pillow numbers its filters
    do_rescale: Switch = None
    rescale_factor: Annotated[float, Field(gt=0, le=1e4)] | None = None
    do_normalize: Switch = None
    image_mean: Annotated[list[Value], Field(min_length=3, max_length=3)] | Value | None = None
    image_std: Annotated[list[Spread], Field(min_length=3, max_length=3)] | Spread | None = None


@dataclass(frozen=True, kw_only=True)
class QwenPictures(Pictures):
    """Pictures of any size, cut into patches."""

    size: dict[Literal["shortest_edge", "longest_edge", "min_pixels", "max_pixels"], Pixels] | None = None  # all of them areas
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


@dataclass(frozen=True, kw_only=True)
class ClipPictures(Pictures):
    """Pictures of one size, or tiles of that size."""

    size: Sides | Annotated[list[Side], Field(min_length=2, max_length=2)] | Side | None = None
    crop_size: Sides | Annotated[list[Side], Field(min_length=2, max_length=2)] | Side | None = None
    do_center_crop: Switch = None
    do_pad: Switch = None


class PictureProcessor(Protocol):
    """What is used of a picture processor of transformers, whose settings become attributes when it is made. Some have fewer."""

    size: Any
    crop_size: Any
    do_resize: bool
    do_pad: bool
    do_center_crop: bool
    resample: Any

    def __call__(self, *, images: Any, return_tensors: str, **options: Any) -> Mapping[str, Any]:
        """Pictures to arrays."""


def read_settings(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The settings and their file: `image_processor` of the shared file, else the processor's own file, as in transformers.

    Returns: None if neither exists. Raises: GlimpseError when a file is damaged.
    """
    shared = folder / SHARED
    settings = read_json(shared, required=False).get("image_processor")
    if settings is not None:
        if not isinstance(settings, dict):
            raise GlimpseError(f"{shared}: image_processor={shown(settings)} must be an object")
        return shared, settings
    own = folder / OWN
    return (own, read_json(own)) if kind_of(own) is not None else None


def missing(folder: Path) -> GlimpseError:
    return GlimpseError(
        f"{folder / OWN}: file is missing, and {SHARED} has no image_processor: how pictures become pixels is not known (the model it was "
        "made of has one of them)"
    )


def check_model(settings: Mapping[str, Any], model: Mapping[str, Any], path: Path) -> None:
    """Raises: GlimpseError when a setting differs from the model's value."""
    other = {name: value for name, value in model.items() if settings.get(name, value) != value}
    wrong = [f"{name}={shown(settings[name])} (model: {value})" for name, value in other.items()]
    if wrong:
        raise GlimpseError(f"{path}: does not fit the model: {', '.join(wrong)}")


def build(kind: tuple[str, str], schema: type, settings: Mapping[str, Any], more: Mapping[str, Any], path: Path) -> PictureProcessor:
    """A picture processor of transformers.

    Args: schema: one of the dataclasses above; other fields of the file are ignored. more: further settings, which the file may override.
    Raises: GlimpseError that names file and setting, or the package that cannot be imported.
    """
    names = [field.name for field in dataclasses.fields(schema) if field.name in settings]
    checked(schema(**{name: settings[name] for name in names}), str(path))
    make = load_class(*kind)
    try:
        return make(**{**more, **{name: settings[name] for name in names}})
    except ImportError as error:
        raise broken(kind[0], error) from error
    except Exception as error:  # a library's own errors on settings that it cannot use together
        raise GlimpseError(f"{path}: settings cannot be used ({one_line(error)})") from error


def tried(processor: PictureProcessor, side: int, path: Path, **options: Any) -> Mapping[str, np.ndarray]:
    """The processor's output for a square test picture. Raises: GlimpseError that names the file."""
    try:
        return processor(images=Image.new("RGB", (side, side)), return_tensors="np", **options)
    except Exception as error:  # a library's own errors on settings that it cannot use together
        raise GlimpseError(f"{path}: settings cannot be used ({one_line(error)})") from error


def pixel_limits(processor: PictureProcessor, path: Path) -> None:
    """Raises: GlimpseError unless a Qwen processor's least and most pixels are set and valid."""
    least, most = (getattr(processor.size, name, None) for name in ("shortest_edge", "longest_edge"))
    if not least or not most:
        raise GlimpseError(f"{path}: size must hold shortest_edge and longest_edge (least and most pixels), or min_pixels and max_pixels")
    if least > most:
        raise GlimpseError(f"{path}: min_pixels={least} is more than max_pixels={most}")
    if processor.do_resize and processor.resample is None:
        raise GlimpseError(f"{path}: resample is null, but do_resize is true: how pictures are resized is not known")
    if least > MOST_AT_LEAST:
        raise GlimpseError(f"{path}: min_pixels={least} is more than {MOST_AT_LEAST}, to which no small picture is enlarged")


def say_default(path: Path, settings: Mapping[str, Any], processor: PictureProcessor) -> None:
    """Warns when the size of pictures, on which answers depend most, is a default of transformers."""
    if not any(settings.get(name) is not None for name in ("size", "max_pixels")):
        warnings.warn(f"{path}: names no max_pixels: transformers' default of {processor.size.longest_edge} is used", stacklevel=2)
