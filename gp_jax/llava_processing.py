"""LLaVA's pictures and prompts, in both layouts; LLaVA-NeXT's too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from gp_jax.config import ModelConfig
from gp_jax.disk import read_json
from gp_jax.errors import GlimpseError
from gp_jax.pictures import Plot, best_pinpoint, tiled, whole
from gp_jax.pretrained.tower import processor_file
from gp_jax.processing import Area, Processor

if TYPE_CHECKING:
    from transformers.image_processing_backends import PilBackend

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = "</s>"


def vicuna_v1(messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of LLaVA-1.5: pictures in front of the text of their turn, generation prompt included."""
    system, turns = SYSTEM, []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        if message["role"] == "system":
            system = text
        elif message["role"] == "user":
            pictures = f"{IMAGE}\n" * sum(part["type"] == "image" for part in parts)
            turns.append(f"USER: {pictures}{text} ")
        else:
            turns.append(f"ASSISTANT: {text}{END}")
    return f"{system} {''.join(turns)}ASSISTANT:"


class LlavaProcessor(Processor):
    """The layout of transformers: its image processors as the folder sets them up, its chat template."""

    shrinks: ClassVar[bool] = False
    template: str | None = None  # of the processor's own files, and the file; those of the tokenizer come second, as in transformers
    template_file: Path = Path("tokenizer_config.json")

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> "LlavaProcessor":
        """As `Processor.load`; the chat template may stand in files of the processor."""
        processor = super().load(folder, config)
        for path in (folder / name for name in ("chat_template.jinja", "chat_template.json", "processor_config.json")):
            if path.suffix == ".json":
                text = read_json(path, required=False).get("chat_template")
            else:
                text = path.read_text(errors="replace") if path.is_file() else None
            if isinstance(text, str):
                processor.template, processor.template_file = text, path
                break
        return processor

    @classmethod
    def sizes(cls, config: ModelConfig) -> dict[str, Any]:
        points = config.vision.pinpoints
        return {"image_grid_pinpoints": [list(point) for point in points]} if points else {}

    @classmethod
    def image_processor_of(cls, config: ModelConfig, settings: dict[str, Any]) -> "PilBackend":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil  # slow to import
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        side = config.vision.image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        return (LlavaNextImageProcessorPil if config.vision.pinpoints else LlavaImageProcessorPil)(**{**sizes, **settings})

    @classmethod
    def check_trial(cls, config: ModelConfig, trial: Mapping[str, np.ndarray], path: Path) -> None:
        side, found = config.vision.image_size, np.asarray(trial["pixel_values"]).shape[-2:]
        if found != (side, side):
            raise GlimpseError(f"{path}: does not fit the model: pictures become {found[1]} x {found[0]} pixels (model: {side} x {side})")

    def limited(self, max_visual_tokens: int, min_visual_tokens: int = 0) -> "LlavaProcessor":
        """Itself: its pictures have the visual tokens they have. Raises: GlimpseError when these can be more."""
        most = self.config.vision.most_tokens
        if most > max_visual_tokens:
            raise GlimpseError(f"max_visual_tokens={max_visual_tokens}: this model's pictures have up to {most}, which nothing can change")
        return self

    def fitted(self, image: Image.Image, grid: tuple[int, int]) -> Image.Image:
        """Raises: GlimpseError, since the number of visual tokens is fixed."""
        raise GlimpseError("this model's pictures cannot be given with fewer visual tokens: their number is fixed")

    def plot(self, width: int, height: int) -> Plot:
        vision = self.config.vision
        return tiled(vision, height, width) if vision.pinpoints else whole((vision.window_side,) * 2)

    def areas(self, width: int, height: int) -> tuple[Area, ...]:
        vision, settings = self.config.vision, self.image_processor
        if vision.pinpoints:
            return (0, 0, width, height), self._detail(width, height)
        if getattr(settings, "do_pad", False):
            side = max(width, height)
            left, top = (side - width) // 2, (side - height) // 2
            return ((-left, -top, side - left, side - top),)
        short = settings.size["shortest_edge"] if settings.do_resize else None
        if short is None or not settings.do_center_crop:
            return ((0, 0, width, height),)
        least, across = min(width, height), (settings.crop_size["width"], settings.crop_size["height"])
        resized = [int(short * length / least) for length in (width, height)]
        starts = [(new - crop) // 2 * old / new for new, crop, old in zip(resized, across, (width, height), strict=True)]
        ends = [start + crop * old / new for start, crop, new, old in zip(starts, across, resized, (width, height), strict=True)]
        return ((*starts, *ends),)

    def _detail(self, width: int, height: int) -> Area:
        """What LLaVA-NeXT's detail covers: about the whole picture, for its padding goes away in whole visual tokens."""
        vision, (high, wide) = self.config.vision, best_pinpoint(self.config.vision.pinpoints, height, width)
        scale = min(wide / width, high / height)
        top, left, rows, columns = tiled(vision, height, width).crops[1]
        patch, pad_x, pad_y = vision.patch_size, (wide - width * scale) / 2, (high - height * scale) / 2
        edges = ((left, pad_x), (top, pad_y), (left + columns, pad_x), (top + rows, pad_y))
        return tuple((tokens * patch - pad) / scale for tokens, pad in edges)

    def arrays(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray | None]:
        names = ("pixel_values", "image_sizes") if self.config.vision.pinpoints else ("pixel_values",)
        if not images:
            return dict.fromkeys(names)
        made = self.image_processor(images=list(images), return_tensors="np")
        return {name: np.asarray(made[name]) for name in names}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The chat template's text, generation prompt included; vicuna_v1 where a Vicuna's folder has no template.

        Raises: GlimpseError when another decoder has none, or the template's file cannot be used.
        """
        tokenizer, text = self._tokenizer(), self.config.text
        template = self.template or tokenizer.chat_template
        if not template and text.num_key_value_heads != text.num_attention_heads:  # Vicuna shares no key heads; Mistral and Yi do
            raise GlimpseError("this model folder has no chat template and its decoder is no Vicuna, whose prompt is known")
        if not template:
            return vicuna_v1(messages)
        parts = [  # its templates know lists of parts only
            {**m, "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]} for m in messages
        ]
        try:
            return tokenizer.apply_chat_template(parts, chat_template=template, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template may do
            raise GlimpseError(f"{self.template_file}: the chat template fails ({' '.join(str(error).split())[:200]})") from error


class OriginalLlavaProcessor(LlavaProcessor):
    """The layout of LLaVA's own code: CLIP's image processor on a picture padded to a square with the mean colour, vicuna_v1, and text
    tokenized between pictures, which have a token that is in no vocabulary."""

    @classmethod
    def settings(cls, folder: Path) -> tuple[Path, dict[str, Any]]:
        path, settings = super().settings(folder)
        for path in processor_file(folder):  # none or one
            settings = read_json(path)
        pad = read_json(folder / "config.json", required=False).get("image_aspect_ratio") == "pad"
        return path, settings | {"do_pad": pad}

    def refusal(self, question: object) -> str | None:
        return super().refusal(question) or (f"holds the image placeholder {IMAGE}" if IMAGE in str(question) else None)

    def tokenize(self, texts: Sequence[str], prompts: bool = True) -> list[list[int]]:
        tokenizer = self._tokenizer()
        if not prompts:
            return super().tokenize(texts, prompts)
        found = []
        for text in texts:
            first, *others = (tokenizer(part)["input_ids"] for part in text.split(IMAGE))
            start = int(bool(first) and first[0] == tokenizer.bos_token_id)  # of every part, but it begins the prompt only
            found.append([*first, *(token for part in others for token in (self.config.image_token_id, *part[start:]))])
        return found

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """vicuna_v1, whatever template the tokenizer may bring."""
        return vicuna_v1(messages)
