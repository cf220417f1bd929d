"""Pictures and questions to the arrays of a Hugging Face processor: transformers' own tokenizer and PIL image processor."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from gp_jax.config import ModelConfig
from gp_jax.disk import read_json
from gp_jax.errors import GlimpseError
from gp_jax.images import MAX_PIXELS, ImageLike, open_image
from gp_jax.pictures import Plot, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_backends import PilBackend

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its advice to install PyTorch does not apply here

Area = tuple[float, float, float, float]
MAX_TEXT = 1 << 20  # characters: more than any model's context, and some hundred bytes each while they become tokens
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", SENTENCEPIECE)


@dataclass(frozen=True)
class Prepared:
    """`inputs` is what `generate` takes; the rest is for showing the answer."""

    inputs: dict[str, np.ndarray | None]
    images: list[list[Image.Image]]  # per sample and view, upright RGB
    grids: list[tuple[tuple[int, int], ...]]  # per sample and view: (rows, columns) of visual tokens


def unreadable(text: object) -> str | None:
    """Why a text cannot become tokens at all; None: it can."""
    if not isinstance(text, str):
        return f"is of type {type(text).__name__}, not text"
    if not text.strip():
        return "is empty"
    if len(text) > MAX_TEXT:
        return f"has {len(text)} characters, more than {MAX_TEXT}"
    if not text.isprintable() and text.encode("utf-8", "ignore").decode() != text:
        return "is not valid text (it holds half of a surrogate pair)"
    return None


def as_batch(images: Any, questions: str | Sequence[str]) -> tuple[list[list], list[str]]:
    """One question about a picture (or None) or several, or a list of them, as lists. Raises: GlimpseError when they do not match."""
    if isinstance(questions, str):
        images, questions = [images], [questions]
    if not isinstance(questions, list | tuple) or not questions:
        raise GlimpseError("questions must be a question or a list of them")
    if not isinstance(images, list | tuple) or len(images) != len(questions):
        raise GlimpseError(f"{len(questions)} questions need a list of as many images (or lists of images, or None)")
    return [[] if own is None else list(own) if isinstance(own, list | tuple) else [own] for own in images], list(questions)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer. Raises: GlimpseError when it is damaged, or when what reads it is not installed."""
    from transformers import AutoTokenizer  # slow to import
    from transformers.utils import logging

    only_pieces = (folder / SENTENCEPIECE).exists() and not (folder / "tokenizer.json").exists()
    if only_pieces and find_spec("sentencepiece") is None:  # transformers would ask for tiktoken
        raise GlimpseError(f"{folder / SENTENCEPIECE}: cannot be read without sentencepiece (pip install sentencepiece)")
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it also reads config.json and warns about the glimpse's model type
    try:
        return llama_tokenizer(folder) if only_pieces else AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # a library's own errors, whatever they are, mean a tokenizer that cannot be read
        raise GlimpseError(f"{folder}: tokenizer files cannot be read ({' '.join(str(error).split())[:200]})") from error
    finally:
        logging.set_verbosity(level)


def llama_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """A SentencePiece file's tokenizer, as the slow one of transformers 4 that Llama and LLaVA were trained with.

    AutoTokenizer goes by config.json and gives "llava" one without SentencePiece's space in front. Settings that the file leaves out have
    the defaults of then: `<s>` in front, and that space again behind every special token.
    """
    from transformers import LlamaTokenizer  # slow to import

    settings, then = read_json(folder / "tokenizer_config.json", required=False), {"add_bos_token": True, "legacy": True}
    return LlamaTokenizer.from_pretrained(
        str(folder), **{name: default if settings.get(name) is None else settings[name] for name, default in then.items()}
    )


class Processor:
    """Tokenizer, chat template and image processor of one model folder. The tokenizer may be missing: ready-made inputs need none.

    This one is Qwen2.5-VL's; others change how pictures become arrays and text becomes tokens.

    shrinks: whether pictures can be given with fewer visual tokens (`limited`, `fitted`).
    """

    shrinks: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, tokenizer: "PreTrainedTokenizerBase | None", image_processor: "PilBackend"):
        self.config, self.tokenizer, self.image_processor = config, tokenizer, image_processor

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> "Processor":
        """Reads tokenizer and processor files. Raises: GlimpseError when they are damaged or do not fit the model."""
        path, settings = cls.settings(folder)
        sizes = cls.sizes(config)
        wrong = [f"{k}={settings[k]} (model: {v})" for k, v in sizes.items() if k in settings and settings[k] != v]
        if wrong:
            raise GlimpseError(f"{path}: does not fit the model: {', '.join(wrong)}")
        drop = ("image_processor_type", "processor_class", "feature_extractor_type")
        try:
            image_processor = cls.image_processor_of(config, {**sizes, **{k: v for k, v in settings.items() if k not in drop}})
            trial = image_processor(images=Image.new("RGB", (64, 64)), return_tensors="np")
        except Exception as error:  # a library's own errors on settings that it cannot use
            raise GlimpseError(f"{path}: settings cannot be used ({' '.join(str(error).split())[:200]})") from error
        cls.check_trial(config, trial, path)
        tokenizer = None
        if any((folder / name).exists() for name in TOKENIZER_FILES):
            tokenizer = load_tokenizer(folder)
        return cls(config, tokenizer, image_processor)

    @classmethod
    def settings(cls, folder: Path) -> tuple[Path, dict[str, Any]]:
        """The image processor's file and what it says."""
        path = folder / "preprocessor_config.json"
        settings = read_json(path, required=False)
        if not path.exists():  # transformers 5 writes everything into one file
            path = folder / "processor_config.json"
            settings = read_json(path, required=False).get("image_processor") or {}
        return path, settings

    @classmethod
    def sizes(cls, config: ModelConfig) -> dict[str, Any]:
        """Settings that the model fixes."""
        vision = config.vision
        return dict(patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size, merge_size=vision.spatial_merge_size)

    @classmethod
    def image_processor_of(cls, config: ModelConfig, settings: dict[str, Any]) -> "PilBackend":
        """transformers' image processor."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # slow to import

        return Qwen2VLImageProcessorPil(**settings)

    @classmethod
    def check_trial(cls, config: ModelConfig, trial: Mapping[str, np.ndarray], path: Path) -> None:
        """Raises: GlimpseError when what a picture became does not fit the model."""

    def limited(self, max_visual_tokens: int, min_visual_tokens: int = 0) -> "Processor":
        """The same, with larger pictures scaled down to at most so many visual tokens each, and smaller ones up to about the least."""
        if min_visual_tokens > max_visual_tokens:
            raise GlimpseError(f"min_visual_tokens={min_visual_tokens} is more than max_visual_tokens={max_visual_tokens}")
        side = self.config.vision.patch_size * self.config.vision.spatial_merge_size
        least, most = self._pixel_limits()
        most = min(most, max_visual_tokens * side * side)
        least = max(least, min_visual_tokens * side * side)
        image_processor = copy.deepcopy(self.image_processor)
        image_processor.size = type(image_processor.size)(shortest_edge=min(least, most), longest_edge=most)
        return type(self)(self.config, self.tokenizer, image_processor)

    def _pixel_limits(self) -> tuple[int, int]:
        """Fewest and most pixels of a picture after resizing."""
        return self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]

    def plot(self, width: int, height: int) -> Plot:
        """Views and visual tokens of a picture with so many pixels, without looking at it."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize  # slow to import

        side = self.config.vision.patch_size * self.config.vision.spatial_merge_size
        rows, columns = smart_resize(height, width, factor=side, min_pixels=self._pixel_limits()[0], max_pixels=self._pixel_limits()[1])
        return whole((rows // side, columns // side))

    def areas(self, width: int, height: int) -> tuple[Area, ...]:
        """What of a picture the grid of every view covers: left, top, right, bottom in its pixels, perhaps beyond its borders."""
        return ((0, 0, width, height),)

    def views(self, image: Image.Image) -> list[Image.Image]:
        """What every view shows."""
        areas = [tuple(map(round, area)) for area in self.areas(*image.size)]
        return [image if area == (0, 0, *image.size) else image.crop(area) for area in areas]

    def fitted(self, image: Image.Image, grid: tuple[int, int]) -> Image.Image:
        """A picture scaled to exactly so many (rows, columns) of visual tokens, which its own limits on pixels may still change."""
        side = self.config.vision.patch_size * self.config.vision.spatial_merge_size
        return image.convert("RGB").resize((grid[1] * side, grid[0] * side), Image.Resampling.BICUBIC)

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.tokenizer is None:
            raise GlimpseError("this model folder has no tokenizer files: use generate with ready-made inputs")
        return self.tokenizer

    def refusal(self, question: object) -> str | None:
        """Why a text cannot be asked, as the end of a sentence that begins with "the question"; None: it can.

        What stands for a picture in another model's prompts is plain text here.
        """
        if reason := unreadable(question):
            return reason
        ids = self.tokenize([question], prompts=False)[0]
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

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The chat template's text for a conversation, generation prompt included.

        Args: messages: of role and content, which is a text or parts {"type": "image"} and {"type": "text", "text": ...} in any order.
        """
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise GlimpseError("this model folder has no chat template: use generate with ready-made inputs")
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def tokenize(self, texts: Sequence[str], prompts: bool = True) -> list[list[int]]:
        """Token ids, one image token per picture. prompts: they begin a conversation; otherwise they go on with one."""
        return self._tokenizer()(list(texts), add_special_tokens=prompts)["input_ids"]

    def arrays(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray | None]:
        """Pictures as `generate` takes them, by argument."""
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

        Args: images: per question its images (possibly none); questions: as many; rendered: they are whole prompts, of `render`.
        Returns: left-padded inputs, as Hugging Face pads for generation.
        Raises: GlimpseError on an empty question, a bad image, or a question that holds image tokens.
        """
        for i, question in enumerate(questions):
            reason = unreadable(question) if rendered else self.refusal(question)
            if reason:
                raise GlimpseError(f"question {i + 1} {reason}" if len(questions) > 1 else f"the question {reason}")
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
        """Token ids of one prompt, every image placeholder repeated to its picture's rows."""
        ids = np.asarray(self.tokenize([prompt])[0], np.int64)
        is_image = ids == self.config.image_token_id
        if is_image.sum() != len(counts):
            raise GlimpseError(f"the prompt holds {is_image.sum()} image placeholders for {len(counts)} image(s)")
        repeats = np.ones(ids.size, int)
        repeats[is_image] = counts
        return np.repeat(ids, repeats)

    def text(self, tokens: np.ndarray) -> str:
        """Decoded text of one sample's new tokens, special tokens left out."""
        return self._tokenizer().decode(tokens, skip_special_tokens=True).strip()
