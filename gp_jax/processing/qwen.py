"""Converts pictures and questions to arrays with transformers' own tokenizer and PIL image processor."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from gp_jax.config.model import ModelConfig
from gp_jax.config.vision import QwenVision
from gp_jax.errors import GlimpseError, one_line
from gp_jax.processing.images import MAX_PIXELS, ImageLike, open_image
from gp_jax.processing.library import guarded, load_class
from gp_jax.processing.picture_settings import (
    QWEN,
    PictureProcessor,
    QwenPictures,
    build,
    check_model,
    missing,
    pixel_limits,
    read_settings,
    say_default,
    tried,
)
from gp_jax.processing.prompts import Message, check_rendered, conversation, images_in, unreadable
from gp_jax.processing.templates import Template, find_template
from gp_jax.processing.tokenization import has_tokenizer, load_tokenizer
from gp_jax.processing.views import Plot, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its advice to install PyTorch does not apply here

Area = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prepared:
    """`inputs` are the arguments of `generate`; the rest is for displaying the answer."""

    inputs: dict[str, Any]  # numpy arrays or None
    images: list[list[Image.Image]]  # per sample and view, upright RGB
    grids: list[tuple[tuple[int, int], ...]]  # per sample and view: (rows, columns) of visual tokens


def as_batch(images: Any, questions: str | Sequence[str] | None) -> tuple[list[list], list[str]]:
    """One question about a picture (or None) or several, or a list of them, as lists. Raises: GlimpseError when they do not match."""
    if isinstance(questions, str):
        images, questions = [images], [questions]
    if not isinstance(questions, list | tuple) or not questions:
        raise GlimpseError("questions must be a question or a list of them")
    if not isinstance(images, list | tuple) or len(images) != len(questions):
        raise GlimpseError(f"{len(questions)} questions need a list of as many images (or lists of images, or None)")
    return [[] if own is None else list(own) if isinstance(own, list | tuple) else [own] for own in images], list(questions)


def _vision(config: ModelConfig) -> QwenVision:
    return cast(QwenVision, config.vision)  # every model of these families has such a tower


class Processor:
    """Tokenizer, chat template and image processor of one model folder. Each may be missing: inputs that are arrays already need none.

    This class is that of Qwen2.5-VL and Qwen3-VL; subclasses convert pictures and text in other ways.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: "PreTrainedTokenizerBase | None",
        image_processor: PictureProcessor | GlimpseError,
        template: Template | None = None,
    ):
        """Args: image_processor: or the error that says why there is none."""
        self.config, self.tokenizer, self._image_processor, self.template = config, tokenizer, image_processor, template

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> "Processor":
        """Reads tokenizer, template and processor files. Raises: GlimpseError when they are damaged or do not fit the model."""
        found = cls.settings(folder)
        image_processor = cls.image_processor_of(config, *found) if found else missing(folder)
        tokenizer, template = load_tokenizer(folder) if has_tokenizer(folder) else None, find_template(folder)
        if tokenizer is not None and template is not None:
            tokenizer.chat_template = template.text  # for callers that use only the tokenizer
        return cls(config, tokenizer, image_processor, template)

    @classmethod
    def settings(cls, folder: Path) -> tuple[Path, dict[str, Any]] | None:
        """The image processor's file and its settings; None: there is none. Raises: GlimpseError when a file is damaged."""
        return read_settings(folder)

    @classmethod
    def image_processor_of(cls, config: ModelConfig, path: Path, settings: dict[str, Any]) -> PictureProcessor:
        """transformers' image processor, tested on a picture. Raises: GlimpseError that names file and setting."""
        vision = _vision(config)
        sizes = dict(patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size, merge_size=vision.spatial_merge_size)
        check_model(settings, sizes, path)
        made = build(QWEN, QwenPictures, settings, sizes, path)
        pixel_limits(made, path)
        say_default(path, settings, made)
        tried(made, vision.patch_size * vision.spatial_merge_size, path, do_resize=False)
        return made

    @property
    def image_processor(self) -> PictureProcessor:
        """Raises: GlimpseError when the folder has no settings for one."""
        if isinstance(self._image_processor, GlimpseError):
            raise GlimpseError(str(self._image_processor))
        return self._image_processor

    @property
    def shrinks(self) -> bool:
        """Whether pictures can be scaled down to fewer visual tokens (`limited`, `fitted`)."""
        return bool(self.image_processor.do_resize)

    def limited(self, max_visual_tokens: int, min_visual_tokens: int = 0) -> "Processor":
        """A processor that scales larger pictures down to at most `max_visual_tokens`, and smaller ones up to about `min_visual_tokens`."""
        if min_visual_tokens > max_visual_tokens:
            raise GlimpseError(f"min_visual_tokens={min_visual_tokens} is more than max_visual_tokens={max_visual_tokens}")
        if not self.shrinks:
            raise GlimpseError(f"max_visual_tokens={max_visual_tokens}: do_resize is false, so pictures keep the size they have")
        least, most = self._pixel_limits()
        most = min(most, max_visual_tokens * self._side**2)
        least = max(least, min_visual_tokens * self._side**2)
        image_processor = copy.deepcopy(self.image_processor)
        image_processor.size = type(image_processor.size)(shortest_edge=min(least, most), longest_edge=most)
        return type(self)(self.config, self.tokenizer, image_processor, self.template)

    @property
    def _side(self) -> int:
        """Pixels along a side of one visual token."""
        return (vision := _vision(self.config)).patch_size * vision.spatial_merge_size

    def _pixel_limits(self) -> tuple[int, int]:
        """Fewest and most pixels of a picture after resizing."""
        return self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]

    def plot(self, width: int, height: int) -> Plot:
        """Views and visual tokens of a picture, from its size alone. Raises: GlimpseError for a size that cannot be used."""
        if not self.image_processor.do_resize:
            if width % self._side or height % self._side:
                raise GlimpseError(
                    f"do_resize is false: sides of {width} x {height} pixels would have to be multiples of {self._side} (set it to true)"
                )
            return whole((height // self._side, width // self._side))
        smart_resize, (least, most) = load_class(QWEN[0], "smart_resize"), self._pixel_limits()
        try:
            rows, columns = smart_resize(height, width, factor=self._side, min_pixels=least, max_pixels=most)
        except ValueError as error:
            raise GlimpseError(f"a picture of {width} x {height} pixels cannot be resized ({one_line(error)})") from error
        return whole((rows // self._side, columns // self._side))

    def areas(self, width: int, height: int) -> tuple[Area, ...]:
        """The area of the picture that each view covers: left, top, right, bottom in pixels; it may exceed the picture."""
        return ((0, 0, width, height),)

    def views(self, image: Image.Image) -> list[Image.Image]:
        """The picture of each view."""
        areas = [(round(left), round(top), round(right), round(bottom)) for left, top, right, bottom in self.areas(*image.size)]
        return [image if area == (0, 0, *image.size) else image.crop(area) for area in areas]

    def fitted(self, image: Image.Image, grid: tuple[int, int]) -> Image.Image:
        """A picture scaled to this grid of visual tokens (rows, columns). The limits on pixels may still change its size later."""
        return image.convert("RGB").resize((grid[1] * self._side, grid[0] * self._side), Image.Resampling.BICUBIC)

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.tokenizer is None:
            raise GlimpseError("this model folder has no tokenizer files: use generate with ready-made inputs")
        return self.tokenizer

    def refusal(self, question: Any) -> str | None:
        """Why a text cannot be asked, as the end of a sentence that begins with "the question"; None: it can.

        The image placeholder of another model is plain text here.
        """
        if reason := unreadable(question):
            return reason
        ids = self.tokenize([str(question)], prompts=False)[0]
        for kind, token in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
            if token is not None and token in ids:
                return f"holds the {kind} placeholder {self._tokenizer().convert_ids_to_tokens(token)}"
        most = max(ids, default=0)
        if most >= self.config.text.vocab_size:
            return f"becomes token {most}, which the model's vocabulary of {self.config.text.vocab_size} does not have"
        return None

    def chat(self, images: int, question: str, system: str | None = None) -> str:
        """The chat template's text for one question about some images, generation prompt included."""
        content: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": question}]
        messages = [{"role": "system", "content": system}] if system else []
        return self.render([*messages, {"role": "user", "content": content}])

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The chat template's text for a conversation, generation prompt included.

        Args: messages: of role and content, which is a text or parts {"type": "image"} and {"type": "text", "text": ...} in any order.
        Raises: GlimpseError for invalid messages, without a template, or when it fails, takes too long, or drops pictures or questions.
        """
        said = conversation(messages)
        if self.template is None:
            raise GlimpseError("this model folder has no chat template: use generate with ready-made inputs")
        text = self.template.render(self._for_template(said), self._tokenizer().special_tokens_map)
        check_rendered(text, said, self.placeholder if images_in(said) else "", self.template.file)
        return text

    def _for_template(self, messages: list[Message]) -> list[Message]:
        """Messages in the form that templates of this family expect."""
        return messages

    @cached_property
    def placeholder(self) -> str:
        """The image placeholder in prompts. Raises: GlimpseError when the tokenizer has none."""
        number, tokenizer = self.config.image_token_id, self._tokenizer()
        found = tokenizer.convert_ids_to_tokens(number)
        if not isinstance(found, str) or not found or self.tokenize([found], prompts=False)[0] != [number]:
            raise GlimpseError(f"{tokenizer.name_or_path}: the tokenizer does not fit the model: no text becomes its image token {number}")
        return found

    def check(self, question: str, plots: Sequence[Plot]) -> None:
        """Raises: GlimpseError when a question cannot be asked about pictures with these views. Pixels are not needed."""
        if reason := self.refusal(question):
            raise GlimpseError(f"the question {reason}")
        self._tokens(self.chat(len(plots), question), [plot.rows.size for plot in plots])

    def tokenize(self, texts: Sequence[str], prompts: bool = True) -> list[list[int]]:
        """Token ids, one image token per picture. prompts: whether texts begin a conversation (special tokens are added) or continue one.

        Raises: GlimpseError when the tokenizer fails.
        """
        tokenizer = self._tokenizer()
        return guarded(
            f"{tokenizer.name_or_path}: the tokenizer cannot take this text",
            lambda: tokenizer(list(texts), add_special_tokens=prompts)["input_ids"],
        )

    def arrays(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray | None]:
        """Pictures as arguments of `generate`, by name."""
        pixels, grids = self.pixels(images) if images else (None, None)
        return {"pixel_values": pixels, "image_grid_thw": grids}

    def pixels(self, images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        """Resized, normalised, cut into patches. Returns: (patches, patch_dim) float32 and grids (images, 3)."""
        parts = [self.image_processor(images=image, return_tensors="np") for image in images]
        return np.concatenate([p["pixel_values"] for p in parts]), np.concatenate([p["image_grid_thw"] for p in parts])

    def __call__(
        self,
        images: Sequence[Sequence[ImageLike]],
        questions: Sequence[str],
        system: str | None = None,
        max_image_pixels: int = MAX_PIXELS,
        rendered: bool = False,
    ) -> Prepared:
        """Prepares a batch.

        Args: images: those of each question, possibly none; questions: one per entry of `images`; rendered: they are prompts of `render`.
        Returns: left-padded inputs, as Hugging Face pads for generation.
        Raises: GlimpseError on an empty question, a bad image, or a question that holds image tokens.
        """
        for i, question in enumerate(questions):
            reason = unreadable(question) if rendered else self.refusal(question)
            if reason:
                raise GlimpseError(f"question {i + 1} {reason}" if len(questions) > 1 else f"the question {reason}")
        if system and (reason := self.refusal(system)):
            raise GlimpseError(f"the system message {reason}")
        opened = [[open_image(image, max_image_pixels, f"image {k + 1}") for k, image in enumerate(own)] for own in images]
        plots = [[self.plot(*image.size) for image in own] for own in opened]
        texts = [q if rendered else self.chat(len(own), q, system) for own, q in zip(opened, questions, strict=True)]
        rows = [self._tokens(text, [plot.rows.size for plot in own]) for text, own in zip(texts, plots, strict=True)]
        length = max(row.size for row in rows)
        ids = np.full((len(rows), length), self.config.pad_token_id, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for row, tokens in enumerate(rows):
            ids[row, length - tokens.size :], mask[row, length - tokens.size :] = tokens, 1
        inputs = {"input_ids": ids, "attention_mask": mask, **self.arrays([image for own in opened for image in own])}
        views = [[view for image in own for view in self.views(image)] for own in opened]
        return Prepared(inputs, views, [tuple(grid for plot in own for grid in plot.grids) for own in plots])

    def _tokens(self, prompt: str, counts: Sequence[int]) -> np.ndarray:
        """Token ids of one prompt, every image placeholder repeated to the number of its picture's rows."""
        ids = np.asarray(self.tokenize([prompt])[0], np.int64)
        is_image = ids == self.config.image_token_id
        if is_image.sum() != len(counts):
            raise GlimpseError(f"the prompt holds {is_image.sum()} image placeholders for {len(counts)} image(s)")
        repeats = np.ones(ids.size, int)
        repeats[is_image] = counts
        return np.repeat(ids, repeats)

    def text(self, tokens: np.ndarray) -> str:
        """Decoded text of one sample's new tokens, special tokens left out."""
        tokenizer = self._tokenizer()
        wrong = f"{tokenizer.name_or_path}: the tokenizer cannot make text of these tokens"
        return guarded(wrong, lambda: tokenizer.decode(tokens, skip_special_tokens=True)).strip()
