"""GlimpseVLM, the front door: load, generate, answer, look, save."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gp_jax.buckets import Ladders
from gp_jax.clock import Clock
from gp_jax.engine import Engine
from gp_jax.errors import GlimpseError
from gp_jax.glimpse.select import Prune
from gp_jax.images import MAX_PIXELS, ImageLike
from gp_jax.layout import read_samples
from gp_jax.lvlm import LVLM
from gp_jax.pretrained import files, params
from gp_jax.pretrained.hf_config import flat_hf_config, glimpse_config, model_config
from gp_jax.pretrained.torch_file import write_torch
from gp_jax.processing import Prepared, Processor
from gp_jax.requests import AUTO, cut_inputs, resolve, sampling_settings
from gp_jax.results import Answer, Generation, outcome, per_token, split_tokens
from gp_jax.warmup import WarmUp

ALL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.pt")


class GlimpseVLM:
    """A vision-language model that can prune its visual tokens after one glimpse."""

    def __init__(
        self,
        model: LVLM,
        hf_config: dict[str, Any],
        processor: Processor,
        *,
        folder: Path | None = None,
        mesh: Mesh | None = None,
        ladders: Ladders | None = None,
        attention: str = AUTO,
        nested_keys: bool = False,
    ):
        self.model, self.config, self.glimpse_config = model, model.config, model.glimpse_config
        self.hf_config, self.processor, self.folder, self.nested_keys = hf_config, processor, folder, nested_keys
        self.engine = Engine(model, ladders, mesh, attention)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike,
        glimpse: str | os.PathLike | None = None,
        dtype: Any = None,
        mesh: Mesh | None = None,
        ladders: Ladders | None = None,
        attention: str = AUTO,
        progress: bool = False,
    ) -> "GlimpseVLM":
        """Loads a Hugging Face checkpoint and a glimpse.

        Args:
            path_or_hub_id: folder or Hub repository with config.json and safetensors.
            glimpse: folder or Hub repository with config.json and glimpse.safetensors or new_modules_gp.pt; None: the model
                folder's own, if it has one.
            dtype: of the base's weights and activations, e.g. "bfloat16"; None: as stored. The glimpse is always float32.
            mesh: device mesh (`sharding.make_mesh`), None: one device.
            attention: implementation, a name of `ops.attention.KERNELS`.
        Raises: GlimpseError that names the file, field or keys at fault.
        """
        folder = files.find_folder(path_or_hub_id, ALL_FILES)
        hf_config = files.read_json(folder / "config.json")
        generation = files.read_json(folder / "generation_config.json", required=False)
        config = model_config(hf_config, generation, str(folder / "config.json"))
        own = glimpse is None
        home = folder if own else files.find_folder(glimpse, ("*.json", files.GLIMPSE_TENSORS, files.GLIMPSE_TORCH))
        extra = settings = None
        if not own or files.has_glimpse(home):
            extra = files.glimpse_source(home)
            settings = glimpse_config(files.read_json(home / "config.json"), config, str(home / "config.json"))
        processor = Processor.load(folder, config)
        base = files.base_source(folder)
        bar = (lambda items: tqdm(items, desc="loading weights", unit="tensor")) if progress else iter
        dtype = None if dtype is None else jnp.dtype(dtype)
        model = params.load(config, settings, base, extra, dtype=dtype, mesh=mesh, progress=bar)
        nested = any(key.startswith("model.language_model.") for key in base.shapes)
        return cls(model, hf_config, processor, folder=folder, mesh=mesh, ladders=ladders, attention=attention, nested_keys=nested)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes base (Hugging Face safetensors, in the key style it was read), glimpse (safetensors and `new_modules_gp.pt`),
        config and tokenizer files. A failed save leaves nothing behind."""
        folder = Path(folder)
        base, _ = params.export(self.model, "nested" if self.nested_keys else "flat")
        with files.staged(folder) as scratch:
            files.write_shards(scratch, base)
            self._write_config(scratch)
            self._write_glimpse(scratch)
            for path in files.side_files(self.folder) if self.folder else ():
                shutil.copy(path, scratch / path.name)
            fresh = {path.name for path in scratch.iterdir()}
        files.remove_stale_weights(folder, fresh)

    def save_glimpse(self, folder: str | os.PathLike) -> None:
        """Writes the glimpse alone: config.json, glimpse.safetensors and new_modules_gp.pt. Raises: GlimpseError without one."""
        if self.glimpse_config is None:
            raise GlimpseError("there is no glimpse to save")
        with files.staged(Path(folder)) as scratch:
            self._write_config(scratch)
            self._write_glimpse(scratch)

    def _write_config(self, folder: Path) -> None:
        config = flat_hf_config(self.hf_config, self.glimpse_config) if self.glimpse_config else self.hf_config
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _write_glimpse(self, folder: Path) -> None:
        _, glimpse = params.export(self.model, "flat")
        if glimpse:
            glimpse = {key: np.asarray(value) for key, value in glimpse.items()}
            files.write_tensors(folder / files.GLIMPSE_TENSORS, glimpse)
            write_torch(folder / files.GLIMPSE_TORCH, params.nested_glimpse(glimpse))

    # Requests ---------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        *,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        prune: Prune | str | None = AUTO,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | str | None = AUTO,
        stream: Callable[[np.ndarray], None] | None = None,
        timed: bool = False,
    ) -> Generation:
        """Prunes and generates.

        Args:
            input_ids, attention_mask, pixel_values, image_grid_thw: what a Hugging Face processor returns, as numpy. Rows may be
                padded on either side; images belong to the image tokens in order.
            prune: Prune settings, None for none, "auto" for those in the glimpse's config.
            max_new_tokens: at most so many.
            temperature: 0 is greedy; top_k (0 off), top_p (1 off) and seed matter above 0.
            eos_token_id: id or ids that end a sample; "auto": the checkpoint's; None: never end early.
            stream: called with the new tokens (B,) int32 of every step; padding on samples that have ended.
            timed: measure seconds per stage, which waits for the device between stages.
        Raises: GlimpseError that names the argument at fault, before anything runs.
        """
        plan, prune = resolve(prune, self.glimpse_config)
        settings = sampling_settings(self.config, temperature, top_k, top_p, seed, eos_token_id)
        if max_new_tokens < 1:
            raise GlimpseError(f"max_new_tokens={max_new_tokens} must be at least 1")
        self.engine.ladders.decode.fit(max_new_tokens)
        samples = read_samples(self.config, input_ids, attention_mask, pixel_values, image_grid_thw)
        clock = Clock(timed)
        filled = self.engine.prefill(samples, plan, cut_inputs(self.engine, samples, plan, prune), clock)
        positions = [sample.next_position for sample in samples]
        if prune and prune.released_batch_positions:
            positions = [positions[-1]] * len(samples)
        for tokens in self.engine.decode(filled, positions, settings, max_new_tokens, stream is not None):
            if stream:
                stream(tokens[:, -1])
        clock.lap("decode")
        return Generation(tokens=tokens, timings=clock.seconds, **outcome(filled, samples, bool(plan)))

    def answer(
        self,
        images: ImageLike | Sequence,
        questions: str | Sequence[str],
        *,
        system: str | None = None,
        max_image_pixels: int = MAX_PIXELS,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Answer | list[Answer]:
        """Answers questions about pictures (paths, PIL images or arrays).

        Args:
            images: for one question: an image or a list of them. For a list of questions: a list with, per question, an image, a
                list of images, or None.
            system: system message, default the chat template's.
            on_text: called with the growing answer of a single question.
            options: as for `generate` (prune, max_new_tokens, temperature, ...).
        Returns: an Answer, or a list of them for a list of questions.
        """
        clock = Clock(enabled=True)
        prepared = self._prepare(images, questions, system, max_image_pixels)
        clock.lap("processing")
        pieces: list[int] = []

        def show(tokens: np.ndarray) -> None:
            pieces.append(int(tokens[0]))
            on_text(self.processor.text(np.array(pieces)))

        done = self.generate(**prepared.inputs, **options, stream=show if on_text else None, timed=True)
        samples = read_samples(self.config, **prepared.inputs)
        answers = [
            Answer(
                text=self.processor.text(tokens),
                tokens=tokens,
                kept=int(keep.sum()),
                total=keep.size,
                keep=split_tokens(keep, sample.grids),
                images=own,
                timings=clock.seconds | done.timings,
            )
            for tokens, keep, sample, own in zip(done.tokens, done.keep, samples, prepared.images, strict=True)
        ]
        return answers[0] if isinstance(questions, str) else answers

    def glimpse(
        self, images: ImageLike | Sequence | None = None, questions: str | Sequence[str] | None = None, *, inputs: dict | None = None
    ) -> list:
        """The importance map alone: what the glimpse finds relevant, in 0 .. 1. Layers behind the glimpse do not run.

        Args: images, questions: as for `answer`; or inputs: a dict as for `generate`.
        Returns: for one question a list with a (rows, columns) float32 map per image; for several (or `inputs`) a list of lists.
        """
        plan, prune = resolve(Prune(), self.glimpse_config)
        if inputs is None:
            inputs = self._prepare(images, questions, None, MAX_PIXELS).inputs
        samples = read_samples(self.config, **inputs)
        filled = self.engine.prefill(samples, plan, cut_inputs(self.engine, samples, plan, prune), stop_at_scores=True)
        _, logits = per_token(filled, samples)
        maps = [split_tokens(1 / (1 + np.exp(-row)), sample.grids) for row, sample in zip(logits, samples, strict=True)]
        return maps[0] if isinstance(questions, str) else maps

    def _prepare(self, images: Any, questions: str | Sequence[str], system: str | None, max_image_pixels: int) -> Prepared:
        if isinstance(questions, str):
            images, questions = [images], [questions]
        if not isinstance(images, list | tuple) or len(images) != len(questions):
            raise GlimpseError(f"{len(questions)} questions need a list of as many images (or lists of images, or None)")
        own = [[] if entry is None else list(entry) if isinstance(entry, list | tuple) else [entry] for entry in images]
        return self.processor(own, questions, system, max_image_pixels)

    def warm_up(
        self,
        *,
        prune: Prune | str | None = AUTO,
        batch: int = 1,
        patches: int | None = None,
        prompt: int | None = None,
        max_new_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        """Compiles every program that requests up to these lengths can need (default: the whole ladders).

        Args: batch: samples; patches: vision patches of a sample; prompt: prompt tokens of a sample with its visual tokens.
        """
        ladders = self.engine.ladders
        lengths = dict(
            batch=batch,
            patches=patches or ladders.patches.rungs[-1],
            prompt=prompt or ladders.prompt.rungs[-1],
            new_tokens=max_new_tokens or ladders.decode.rungs[-1],
        )
        plan, _ = resolve(prune, self.glimpse_config)
        settings = sampling_settings(self.config, 0.0, 0, 1.0, 0, AUTO)
        bar = (lambda items: tqdm(items, desc="compiling", unit="bucket")) if progress else iter
        WarmUp(self.engine, plan, settings, **lengths).run(bar)
