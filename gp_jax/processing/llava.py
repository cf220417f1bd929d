"""LLaVA's pictures and prompts, in both layouts; LLaVA-NeXT's too."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from PIL import Image

from gp_jax.config.model import ModelConfig
from gp_jax.config.vision import ClipConfig
from gp_jax.errors import GlimpseError
from gp_jax.pretrained.tower import KNOWN, NAME, processor_file
from gp_jax.processing.images import MAX_PIXELS
from gp_jax.processing.picture_settings import CLIP, TILES, ClipPictures, PictureProcessor, build, check_model, read_settings, tried
from gp_jax.processing.prompts import Message, conversation, parts_of
from gp_jax.processing.qwen import Area, Processor
from gp_jax.processing.views import Plot, best_pinpoint, tiled, whole
from gp_jax.runtime.disk import read_json

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = "</s>"
MOST_PADDED = 2 * MAX_PIXELS  # pixels of a picture after padding to a square


def vicuna_v1(messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of LLaVA-1.5: pictures come before the text of their turn; with the generation prompt."""
    system, turns = SYSTEM, []
    for message in messages:
        parts = parts_of(message)
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        if message["role"] == "system":
            system = text
        elif message["role"] == "user":
            pictures = f"{IMAGE}\n" * sum(part["type"] == "image" for part in parts)
            turns.append(f"USER: {pictures}{text} ")
        else:
            turns.append(f"ASSISTANT: {text}{END}")
    return f"{system} {''.join(turns)}ASSISTANT:"


def _vision(config: ModelConfig) -> ClipConfig:
    return cast(ClipConfig, config.vision)  # every model of this family has this tower


class LlavaProcessor(Processor):
    """The layout of transformers: its image processors, configured by the folder, and its chat template."""

    shrinks: ClassVar[bool] = False

    @classmethod
    def image_processor_of(cls, config: ModelConfig, path: Path, settings: dict[str, Any]) -> PictureProcessor:
        vision = _vision(config)
        side = vision.image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        if vision.pinpoints:  # always padded, so that pictures with fewer tiles fit into a batch
            points = {"image_grid_pinpoints": [list(point) for point in vision.pinpoints]}
            check_model(settings, points, path)
            made = build(TILES, ClipPictures, settings | {"do_pad": True}, sizes | points, path)
        else:
            made = build(CLIP, ClipPictures, settings, sizes, path)
        pixels = np.asarray(tried(made, side, path)["pixel_values"])
        if pixels.shape[-2:] != (side, side):
            high, wide = pixels.shape[-2:]
            raise GlimpseError(f"{path}: does not fit the model: pictures become {wide} x {high} pixels (model: {side} x {side})")
        tiles = 1 + math.prod(best_pinpoint(vision.pinpoints, side, side)) // side**2 if vision.pinpoints else 1
        if pixels.size != tiles * vision.in_channels * side**2:
            raise GlimpseError(f"{path}: does not fit the model: a picture becomes {pixels.shape[-4]} tiles (model: {tiles})")
        return made

    def limited(self, max_visual_tokens: int, min_visual_tokens: int = 0) -> "LlavaProcessor":
        """Itself: the number of visual tokens cannot be changed. Raises: GlimpseError when it can exceed the limit."""
        most = _vision(self.config).most_tokens
        if most > max_visual_tokens:
            raise GlimpseError(f"max_visual_tokens={max_visual_tokens}: this model's pictures have up to {most}, which nothing can change")
        return self

    def fitted(self, image: Image.Image, grid: tuple[int, int]) -> Image.Image:
        """Raises: GlimpseError, since the number of visual tokens is fixed."""
        raise GlimpseError("this model's pictures cannot be given with fewer visual tokens: their number is fixed")

    def plot(self, width: int, height: int) -> Plot:
        vision, settings = _vision(self.config), self.image_processor
        if not vision.pinpoints and settings.do_pad and max(width, height) ** 2 > MOST_PADDED:
            raise GlimpseError(f"a picture of {width} x {height} pixels, padded to a square, has more than {MOST_PADDED} pixels")
        if not vision.pinpoints and not settings.do_center_crop:
            self._check_uncropped(width, height)
        return tiled(vision, height, width) if vision.pinpoints else whole((vision.window_side,) * 2)

    def _check_uncropped(self, width: int, height: int) -> None:
        """Raises: GlimpseError for a picture that is not resized or cropped to the tower's size."""
        settings, side = self.image_processor, _vision(self.config).image_size
        wide, high = (max(width, height),) * 2 if settings.do_pad else (width, height)
        if settings.do_resize and not settings.size.shortest_edge:
            return  # to height and width
        if wide != high or (wide != side and not settings.do_resize):
            off = "do_center_crop is" if settings.do_resize else "do_resize and do_center_crop are"
            raise GlimpseError(f"{off} false: a picture of {width} x {height} pixels does not become {side} x {side}")

    def areas(self, width: int, height: int) -> tuple[Area, ...]:
        vision, settings = _vision(self.config), self.image_processor
        if vision.pinpoints:
            return (0, 0, width, height), self._detail(width, height)
        if getattr(settings, "do_pad", False):
            side = max(width, height)
            left, top = (side - width) // 2, (side - height) // 2
            return ((-left, -top, side - left, side - top),)
        if not settings.do_center_crop:
            return ((0, 0, width, height),)
        least, across = min(width, height), (settings.crop_size["width"], settings.crop_size["height"])
        resized = [width, height]
        if settings.do_resize and (short := settings.size.shortest_edge):
            resized = [int(short * length / least) for length in (width, height)]
        elif settings.do_resize:
            resized = [settings.size.width, settings.size.height]
        starts = [(new - crop) // 2 * old / new for new, crop, old in zip(resized, across, (width, height), strict=True)]
        ends = [start + crop * old / new for start, crop, new, old in zip(starts, across, resized, (width, height), strict=True)]
        return ((starts[0], starts[1], ends[0], ends[1]),)

    def _detail(self, width: int, height: int) -> Area:
        """The area of LLaVA-NeXT's detail view: approximately the whole picture, since padding is removed in whole visual tokens."""
        vision = _vision(self.config)
        high, wide = best_pinpoint(vision.pinpoints, height, width)
        scale = min(wide / width, high / height)
        top, left, rows, columns = tiled(vision, height, width).crops[1]
        patch, pad_x, pad_y = vision.patch_size, (wide - width * scale) / 2, (high - height * scale) / 2
        edges = ((left, pad_x), (top, pad_y), (left + columns, pad_x), (top + rows, pad_y))
        x, y, right, bottom = ((tokens * patch - pad) / scale for tokens, pad in edges)
        return x, y, right, bottom

    def arrays(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray | None]:
        names = ("pixel_values", "image_sizes") if _vision(self.config).pinpoints else ("pixel_values",)
        if not images:
            return dict.fromkeys(names)
        made = self.image_processor(images=list(images), return_tensors="np")
        return {name: np.asarray(made[name]) for name in names}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """As `Processor.render`; vicuna_v1 where a Vicuna's folder has no template.

        Raises: also GlimpseError when another decoder has none.
        """
        text = self.config.text
        if self.template is not None:
            return super().render(messages)
        if text.num_key_value_heads != text.num_attention_heads:  # Vicuna has no grouped key-value heads; Mistral and Yi do
            raise GlimpseError("this model folder has no chat template and its decoder is no Vicuna, whose prompt is known")
        return vicuna_v1(conversation(messages))

    def _for_template(self, messages: list[Message]) -> list[Message]:
        return [{**message, "content": parts_of(message)} for message in messages]  # templates of this family expect lists of parts


class OriginalLlavaProcessor(LlavaProcessor):
    """The layout of LLaVA's own code: CLIP's image processor on a picture padded to a square with the mean colour, vicuna_v1, and text
    that is tokenized between pictures, since their token is not part of the vocabulary."""

    @classmethod
    def settings(cls, folder: Path) -> tuple[Path, dict[str, Any]] | None:
        """As `Processor.settings`; if the folder has no file, the tower's, as in LLaVA's own code, or its published values."""
        hf = read_json(folder / "config.json", required=False)
        if found := read_settings(folder):
            path, settings = found
        elif there := processor_file(folder):
            path, settings = there[0], read_json(there[0])
        elif hf.get(NAME) in KNOWN:
            path, settings = folder / "config.json", {}
            warnings.warn(f"{path}: pictures are prepared as published for {hf[NAME]}, whose files are not here", stacklevel=2)
        else:
            return None
        return path, settings | {"do_pad": hf.get("image_aspect_ratio") == "pad"}

    def refusal(self, question: object) -> str | None:
        return super().refusal(question) or (f"holds the image placeholder {IMAGE}" if IMAGE in str(question) else None)

    def tokenize(self, texts: Sequence[str], prompts: bool = True) -> list[list[int]]:
        tokenizer = self._tokenizer()
        if not prompts:
            return super().tokenize(texts, prompts)
        found = []
        for text in texts:
            first, *others = (tokenizer(part)["input_ids"] for part in text.split(IMAGE))
            start = int(bool(first) and first[0] == tokenizer.bos_token_id)  # the tokenizer adds it to every part; only the first keeps it
            found.append([*first, *(token for part in others for token in (self.config.image_token_id, *part[start:]))])
        return found

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Always vicuna_v1, even if the tokenizer has a template."""
        return vicuna_v1(conversation(messages))
