"""GlimpseVLM, the front door: load, generate, answer, look, save."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gp_jax.buckets import Ladders
from gp_jax.config.schema import AtLeastOne, one
from gp_jax.inference.decoding import Rows
from gp_jax.inference.engine import Engine
from gp_jax.inference.function import fitting_inputs, inference_buckets, inference_inputs
from gp_jax.inference.logprobs import score_completions
from gp_jax.inference.looks import look_twice, plans_of
from gp_jax.inference.notebook import describe
from gp_jax.inference.requests import AUTO, Pruning, check_names, resolve, sampling_settings
from gp_jax.inference.results import Answer, Generation, answers_of, outcome, per_token, split_tokens
from gp_jax.inference.warmup import WarmUp
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained import adapters, saving
from gp_jax.pretrained.checkpoint import Checkpoint, dtype_of
from gp_jax.processing.images import MAX_PIXELS, ImageLike
from gp_jax.processing.layout import ARRAYS, Sample, read_samples
from gp_jax.processing.qwen import Prepared, Processor, as_batch
from gp_jax.processing.table import load_processor
from gp_jax.pruning.rule import Prune
from gp_jax.runtime.clock import Clock
from gp_jax.runtime.progress import announce, bar
from gp_jax.scenes.familiar import warn_of_strange
from gp_jax.trees import Prefix


class GlimpseVLM:
    """A vision-language model that can prune its visual tokens after one glimpse."""

    __repr__ = describe

    def __init__(
        self,
        model: LVLM,
        hf_config: dict[str, Any],
        processor: Processor,
        *,
        folder: Path | None = None,
        mesh: Mesh | None = None,
        ladders: Ladders | None = None,
        attention: str = "auto",
        nested_keys: bool = False,
        name: str | None = None,
    ):
        """name: of the base, which files of an adapter refer to."""
        self.model, self.config, self.glimpse_config = model, model.config, model.glimpse_config
        self.hf_config, self.processor, self.folder, self.nested_keys, self.name = hf_config, processor, folder, nested_keys, name
        self.engine = Engine(model, ladders, mesh, attention)

    def with_model(self, model: LVLM) -> "GlimpseVLM":
        """The same front door with another model behind it, e.g. one whose glimpse was trained."""
        other, old = copy.copy(self), self.engine
        other.model, other.config, other.glimpse_config = model, model.config, model.glimpse_config
        other.engine = Engine(model, old.ladders, old.mesh, old.attention)
        return other

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike,
        glimpse: str | os.PathLike | None = None,
        dtype: Any = None,
        mesh: Mesh | None = None,
        ladders: Ladders | None = None,
        attention: str = "auto",
        progress: bool = False,
        adapter: str | os.PathLike | None = None,
    ) -> "GlimpseVLM":
        """Loads a Hugging Face checkpoint and a glimpse.

        Args:
            path_or_hub_id: folder or Hub repository with config.json and safetensors.
            glimpse: folder or Hub repository with config.json and glimpse.safetensors or new_modules_gp.pt; None: the model's own, if any.
            dtype: of the base's weights and activations, e.g. "bfloat16"; None: as stored. The glimpse is always float32.
            mesh: device mesh (`sharding.make_mesh`), None: one device. attention: over long sequences, "auto" or a name in `ops.attention`.
            progress: say what is waited for: weights that are read; from then on also programs that are made for the first time.
            adapter: folder or Hub repository of a LoRA adapter in PEFT's files. It stays beside the weights, in float32.
        Raises: GlimpseError that names the file, field or keys at fault.
        """
        announce(progress)
        dtype, stored = dtype_of(dtype), Checkpoint.find(path_or_hub_id, glimpse, adapter)
        processor = load_processor(stored.folder, stored.config)
        model = stored.load(dtype, mesh, bar("loading weights", "tensor", progress))
        options: dict[str, Any] = dict(mesh=mesh, ladders=ladders, attention=attention, nested_keys=stored.nested, name=stored.name)
        return cls(model, stored.hf, processor, folder=stored.folder, **options)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes base, glimpse, config, tokenizer and processor files; see `pretrained.saving`. Raises: GlimpseError with an adapter."""
        saving.save_model(self.model, self.hf_config, Path(folder), source=self.folder, nested=self.nested_keys)

    def save_glimpse(self, folder: str | os.PathLike) -> None:
        """Writes the glimpse alone, as a released folder. Raises: GlimpseError without one."""
        saving.save_glimpse(self.model, self.hf_config, Path(folder))

    def save_adapter(self, folder: str | os.PathLike) -> None:
        """Writes the adapter alone, in PEFT's files; see `pretrained.adapters`. Raises: GlimpseError without one."""
        adapters.save_adapter(self.model, Path(folder), self.name, self.engine.mesh)

    def update(self, params: Mapping[str, Any]) -> None:
        """Takes new parameters of the same structure, all or some of them: nothing is compiled, and no second copy is kept.

        Args: params: nested dicts of arrays, as `inference_params(vlm.model)` gives them. Raises: as `Engine.update`.
        """
        self.engine.update(params)

    def generate(
        self,
        *,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        image_sizes: np.ndarray | None = None,
        prune: Prune | str | None = AUTO,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | str | None = AUTO,
        stream: Callable[[np.ndarray], None] | None = None,
        timed: bool | Clock = False,
        mm_token_type_ids: object = None,
        **unknown: object,
    ) -> Generation:
        """Prunes and generates.

        Args:
            input_ids, attention_mask, pixel_values, image_grid_thw, image_sizes: what the model's Hugging Face processor returns, as
                numpy. Rows may be padded on either side; images belong to the image tokens in order.
            prune: Prune settings (with a `Look`: two looks), None for none, "auto" for those in the glimpse's config.
            max_new_tokens: of a sample. temperature: 0 is greedy; top_k (0 off), top_p (1 off) and seed matter above 0.
            eos_token_id: id or ids that end a sample; "auto": the checkpoint's; None: never end early.
            stream: called with the new tokens (B,) int32 of every step; padding on samples that have ended.
            timed: measure seconds per stage, which waits for the device between stages; or a Clock to go on with.
            mm_token_type_ids: accepted, as processors return it, and not needed.
        Raises: GlimpseError that names the argument at fault, before anything runs.
        """
        check_names("generate", unknown)
        pruning = self.resolve_shortest(prune)
        choose = partial(sampling_settings, self.config, temperature, top_k, top_p, seed, eos_token_id)
        choose()  # raises before anything runs
        self.engine.ladders.decode.fit(max_new_tokens := one(AtLeastOne, max_new_tokens, "max_new_tokens"))
        samples = read_samples(self.config, input_ids, attention_mask, pixel_values, image_grid_thw, image_sizes)
        clock = timed if isinstance(timed, Clock) else Clock(timed)
        filled = self.engine.prefill(self.engine.batch(look_twice(self.engine, samples, pruning, clock), pruning), clock)
        prefix, count = self.engine.prefix(filled), len(samples)
        active = np.arange(prefix.logits.shape[0]) < count
        rows = Rows.behind(self.engine, prefix, choose(active.size), max_new_tokens, active)
        for tokens in rows.run(count, max_new_tokens, stream is not None):
            if stream:
                stream(tokens[:, -1])
        clock.lap("decode")
        return Generation(tokens=tokens, timings=clock.seconds, **outcome(self.engine, filled, bool(pruning.plan)))

    def prefill(self, *, prune: Prune | str | None = AUTO, **inputs: Any) -> Prefix:
        """Reads prompts and prunes them, for `Rows` to go on with: once for any number of continuations.

        Args: prune, inputs: as for `generate`. Raises: GlimpseError likewise.
        """
        check_names("prefill", inputs.keys() - {*ARRAYS, "mm_token_type_ids"})
        pruning = self.resolve_shortest(prune)
        return self.engine.prefix(self.engine.prefill(self.engine.batch(look_twice(self.engine, self._read(inputs), pruning), pruning)))

    def logprobs(
        self,
        *,
        completion_ids: np.ndarray,
        completion_mask: np.ndarray | None = None,
        prune: Prune | None = None,
        mode: str = "exact",
        temperature: float = 1.0,
        **inputs: Any,
    ) -> np.ndarray:
        """Log-probabilities of completions under pruning, in nats: of the distribution that `generate` samples from.

        Args: completion_ids: (B, G, C), G of every prompt; completion_mask: 1 on their tokens; mode: see `inference.logprobs`; inputs: as
            for `generate`. Returns: (B, G, C) float32, 0 on padding. Raises: GlimpseError that names the argument.
        """
        check_names("logprobs", inputs.keys() - {*ARRAYS, "mm_token_type_ids"})
        pruning = self._resolve(prune)
        samples = look_twice(self.engine, self._read(inputs), pruning)
        return score_completions(self.engine, samples, pruning, completion_ids, completion_mask, mode, temperature)

    def answer(
        self,
        images: ImageLike | Sequence,
        questions: str | Sequence[str],
        *,
        system: str | None = None,
        max_image_pixels: int = MAX_PIXELS,
        on_text: Callable[[str], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Answer | list[Answer]:
        """Answers questions about pictures: paths, addresses (https://...), bytes, open files, PIL images or arrays.

        Args:
            images: for one question: an image or a list of them. For a list of questions: a list with, per question, an image, a
                list of images, or None.
            system: system message, default the chat template's.
            on_text: called with the growing answer of a single question.
            on_stage: called with the name of every stage that ends: processing, (look,) vision, glimpse, finish, decode.
            options: as for `generate` (prune, max_new_tokens, temperature, ...).
        Returns: an Answer, or a list of them for a list of questions.
        """
        clock = Clock(enabled=True, on_lap=on_stage)
        prepared = self._prepare(images, questions, system, max_image_pixels)
        warn_of_strange(self.folder, prepared.images, questions, self.processor.tokenize)
        clock.lap("processing")
        pieces: list[int] = []

        def show(tokens: np.ndarray) -> None:
            pieces.append(int(tokens[0]))
            if on_text:
                on_text(self.processor.text(np.array(pieces)))

        done = self.generate(**prepared.inputs, **options, stream=show if on_text else None, timed=clock)
        answers = answers_of(done, prepared, self.processor)
        return answers[0] if isinstance(questions, str) else answers

    def glimpse(
        self, images: ImageLike | Sequence | None = None, questions: str | Sequence[str] | None = None, *, inputs: dict | None = None
    ) -> list:
        """The importance map alone: what the glimpse finds relevant, in 0 .. 1. Layers behind the glimpse do not run.

        Args: images, questions: as for `answer`; or inputs: a dict as for `generate`.
        Returns: for one question a list with a (rows, columns) float32 map per image; for several (or `inputs`) a list of lists.
        """
        samples = self._read(inputs or self._prepare(images, questions, None, MAX_PIXELS).inputs)
        filled = self.engine.prefill(self.engine.batch(samples, self._resolve(Prune())), scores_only=True)
        _, logits = per_token(self.engine.fetch(filled.scores), samples)
        maps = [split_tokens(1 / (1 + np.exp(-row)), sample.grids) for row, sample in zip(logits, samples, strict=True)]
        return maps[0] if isinstance(questions, str) else maps

    def inference_inputs(
        self,
        images: ImageLike | Sequence | None = None,
        questions: str | Sequence[str] | None = None,
        *,
        buckets: Ladders | None = None,
        prune: Prune | str | None = AUTO,
        inputs: dict | None = None,
        shrink: bool = True,
    ) -> dict[str, np.ndarray]:
        """A request as `inference_fn` takes it: a dict of numpy arrays (`inference.INPUTS`), ready for `np.savez`.

        Args: images, questions: as for `answer`; or inputs: a dict as for `generate`; prune, buckets: as for `inference_fn`; shrink:
            scale `images` that are too large down to what the buckets hold; else they are an error.
        """
        plan, rule = self._resolve(prune)
        buckets = buckets or inference_buckets(self.config, cuts=len(plan), look=bool(rule and rule.look))
        if inputs is None:
            own, questions = as_batch(images, questions)
            return fitting_inputs(self.processor, own, questions, self.glimpse_config, rule, buckets, shrink=shrink)[1]
        return inference_inputs(self._read(inputs), self.config, self.glimpse_config, rule, buckets)

    def _resolve(self, prune: Prune | str | None) -> Pruning:
        return resolve(prune, self.glimpse_config, self.config.text.num_hidden_layers)

    def resolve_shortest(self, prune: Prune | str | None) -> Pruning:
        """What `prune` stands for in `generate`."""
        pruning = self._resolve(prune)  # never slower than not pruning: no cuts where everything is kept
        return pruning._replace(plan=()) if pruning.rule is not None and pruning.rule.keeps_everything else pruning

    def _read(self, inputs: Mapping[str, Any]) -> list[Sample]:
        return read_samples(self.config, *(inputs.get(name) for name in ARRAYS))

    def _prepare(self, images: Any, questions: Any, system: str | None, max_image_pixels: int) -> Prepared:
        return self.processor(*as_batch(images, questions), system, max_image_pixels)

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

        Args: prune: the kind of pruning: with the glimpse, none, with reference masks, with a look; the numbers in it do not matter.
            batch: samples; patches: vision patches of a sample; prompt: prompt tokens of a sample with its visual tokens.
        """
        settings = partial(sampling_settings, self.config, 0.0, 0, 1.0, 0, AUTO)
        for plan in plans_of(self.glimpse_config, self._resolve(prune)):
            WarmUp(self.engine, plan, settings, batch, patches, prompt, max_new_tokens).run(bar("compiling", "bucket", progress))
