"""The programs of generation, compiled for a topology: what the engine runs for a batch of equal requests, dense and pruned."""

import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gp_jax.ahead.compiling import Compiler, CompilingEngine, OnChip, Program, bytes_of, placed, quiet, shortage
from gp_jax.ahead.passes import Request, costs_of, passes
from gp_jax.ahead.topology import hbm_bytes, inference_mesh
from gp_jax.buckets import Ladders
from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.flops import Cost, segments
from gp_jax.inference.decoding import Rows
from gp_jax.inference.requests import Batch, CutInput, sampling_settings
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.params import abstract_model
from gp_jax.processing.layout import Sample, text_sample
from gp_jax.pruning.plan import SCORERS, Plan
from gp_jax.sharding import batch_sharding
from gp_jax.trees import KeepLimits, Prefix

LONG = 512  # for sequences of at least this length, no program may store rows x rows scores


@dataclass(frozen=True)
class Compiled:
    """One plan's programs and their totals on a chip."""

    runs: dict[str, int]  # program -> runs for one prefill and one decoded token
    cache: int  # bytes of keys and values that decoding reads
    sizes: dict[str, Cost]  # stage -> cost from sizes, of all chips


@dataclass(frozen=True)
class GenerationReport(OnChip):
    """The report of `compile_generation`. Bytes are per chip."""

    mesh: dict[str, int]
    lengths: dict[str, int]  # rungs that the programs are for
    weights: int
    hbm: int
    programs: tuple[Program, ...]
    plans: dict[str, Compiled]
    scores: int  # bytes that one layer's attention scores of the prompt would take, if they were stored
    seconds: float  # wall time to compile all programs
    cpu_seconds: float  # of all threads

    def program(self, name: str) -> Program:
        return next(p for p in self.programs if p.name == name)


def weight_bytes(model: LVLM) -> int:
    """Bytes of all parameters."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))


def label(function: Callable, args: tuple, static: dict) -> str:
    """A program's name: the function's own in words, with the length that it is for."""
    name = {
        "GlimpsePrompt.per_layer": "glimpse vectors",
        "row_angles": "rope angles",
        "prefill_layer": "layer",
        "add_vectors": "glimpse rows",
        "looking_row": "glimpse input",
        "tap_layer": "glimpse attention",
        "slot_maps": "predictor maps",
        "predictor_layer": "predictor block",
        "stacked": "predictor outputs",
        "last_head": "predictor's last output",
        "embed_rows": "embed",
    }.get(function.__qualname__) or words(function.__qualname__)
    if name == "layer":
        return f"layer, {args[0].shape[1]} rows"
    if name in ("project maps", "read out"):
        return f"predictor {'projection' if name == 'project maps' else 'read-out'}, {args[0].shape[-1]} wide"
    if name == "rope angles":
        return f"{name}, {args[0].shape[-1]} rows"
    if name == "embed":
        return f"embed, {args[0].ids.shape[1]} rows"
    if name == "compact":
        return f"compact to {static['length']} rows"
    if name == "head":
        return f"head behind {args[0].hidden.shape[1]} rows"
    if name == "place":
        return f"place a prompt, cache of {args[0][0].valid.shape[1]} rows"
    if name == "widened":
        return f"widen {args[0].valid.shape[1]} to {static['length']} rows"
    if name == "advance":
        lengths = sorted({kv.valid.shape[1] for kv in args[0]})
        return f"decode, cache of {' and '.join(map(str, lengths))} rows"
    return name


def words(name: str) -> str:
    """ "ClipBlock.run" -> "clip block run"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[._]+", " ", name.removesuffix(".__call__")).lower().strip()


def explained(lengths: set[int], model: LVLM, batch: int, mesh: Mesh) -> dict[int, int]:
    """How many elements an array on a chip may have in which a sequence's length occurs twice: none, but where one of the model's widths
    is the same number, whose activations are rows x width. (With one head on a chip its scores would be no more, so none there either.)"""
    leaves = jax.tree.leaves(nnx.state(model))
    widths = {size for leaf in leaves for size in (*leaf.shape, *leaf.sharding.shard_shape(leaf.shape))}
    samples = batch_sharding(mesh, batch).shard_shape((batch,))[0]
    several = model.config.text.num_attention_heads > mesh.shape["tensor"]
    return {length: samples * length**2 if length in widths and several else 0 for length in lengths}


def padded(request: Request, config: ModelConfig, glimpse: GlimpseConfig, plans: tuple[str, ...], ladders: Ladders) -> dict[str, int]:
    """The rungs that a request takes. Raises: GlimpseError when it is beyond a ladder."""
    try:
        work = request.workload(config.vision, ladders)
        looks = passes("look", request, config, glimpse, work) if "look" in plans else []
        n, kept = work.text + work.visual, work.text + int(request.retention * work.visual)
        prompt = ladders.prompt.fit(n + (glimpse.rows if "glimpse" in plans else 0))
        more: dict[str, int] = {}
        for title, one in zip(("first look", "second look"), looks, strict=False):
            more[f"prompt of the {title}"] = ladders.prompt.fit(one.work.text + one.work.visual + glimpse.rows)
            more[f"patches of the {title}"] = one.slots(config.vision) * config.vision.merge_unit
        return more | dict(
            batch=ladders.batch.fit(request.batch),
            patches=segments(config.vision, work)[1][0],
            prompt=prompt,
            kept=ladders.kept_for(kept, prompt) if "glimpse" in plans else prompt,
            decode=ladders.decode.fit(request.answer_tokens),
        )
    except GlimpseError as error:
        sizes = "--batch {batch} --visual-tokens {visual_tokens} --prompt-tokens {prompt_tokens} --answer-tokens {answer_tokens}"
        raise GlimpseError(f"{sizes.format(**vars(request))}: {error}") from error


def compile_generation(
    config: ModelConfig,
    glimpse: GlimpseConfig,
    topology: str,
    request: Request,
    *,
    plans: tuple[str, ...] = ("glimpse", "dense"),
    sizes: dict[str, int] | None = None,
    dtype: str = "bfloat16",
    ladders: Ladders | None = None,
    watch: Callable[[str], Any] = quiet,
    mesh: Mesh | None = None,
) -> GenerationReport:
    """Compiles what generation runs for a request under every plan ("look", "glimpse", "dense").

    Args: sizes: of the mesh, None: chosen; watch: program's name -> context around its compilation; mesh: instead of the topology's.
    Raises: GlimpseError when the topology is unknown, a length is beyond its ladder, or a program cannot fit a chip at all.
    """
    ladders, hbm, kind = ladders or Ladders(), hbm_bytes(topology), jnp.dtype(dtype)
    abstract = abstract_model(config, glimpse, kind)
    lengths = padded(request, config, glimpse, plans, ladders)
    mesh = mesh or inference_mesh(topology, sizes or {}, config.text, lengths["batch"], weight_bytes(abstract))
    model = placed(abstract, mesh)
    weights = bytes_of(nnx.state(model))
    if weights > hbm:
        raise GlimpseError(f"{topology}: the weights alone need {weights / 2**30:.2f} GiB of {hbm / 2**30:.2f} GiB per chip")
    work = request.workload(config.vision, ladders)
    bare = {ladders.prompt.fit(work.text + work.visual), lengths["patches"] // config.vision.merge_unit}
    long = {r for r in bare | {r for name, r in lengths.items() if name.startswith(("prompt", "patches"))} if r >= LONG}
    rows = explained(long, model, lengths["batch"], mesh)
    compiler = Compiler(mesh, weights, label, watch, rows)

    def compiled(name: str) -> Compiled:
        steps = passes(name, request, config, glimpse, work)
        compiler.begin()
        try:
            for step in steps:
                slots = step.slots(config.vision)
                engine = CompilingEngine(model, ladders, mesh, compiler, slots, step.kept)
                blank = [blank_sample(config, step.work.text + step.work.visual)] * request.batch
                filled = engine.prefill(blank_batch(engine, step.plan, blank, slots), scores_only=step.ends)
            cache = decode(engine, engine.prefix(filled), lengths["decode"])
        except Exception as error:
            if (short := shortage(error)) is None:
                raise
            raise GlimpseError(f"{topology}, program '{compiler.own.current}': {short}") from error
        runs = Counter(p.name for p in compiler.own.ran)
        return Compiled(dict(runs), cache, costs_of(config, glimpse, steps, kind.itemsize))

    start, processor = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(plans)) as threads:  # what the plans share is compiled once, the rest side by side
        found = dict(zip(plans, threads.map(compiled, plans), strict=True))
    start, processor = time.perf_counter() - start, time.process_time() - processor
    scores = jax.ShapeDtypeStruct((lengths["batch"], config.text.num_attention_heads, lengths["prompt"], lengths["prompt"]), jnp.float32)
    by_batch = batch_sharding(mesh, lengths["batch"])
    samples = by_batch.spec[0] if isinstance(by_batch, NamedSharding) else None
    heads = "tensor" if config.text.num_attention_heads % mesh.shape["tensor"] == 0 else None
    scores = scores.update(sharding=NamedSharding(mesh, PartitionSpec(samples, heads)))
    return GenerationReport(
        mesh=dict(mesh.shape),
        lengths=lengths,
        weights=weights,
        hbm=hbm,
        programs=compiler.programs_compiled(),
        plans=found,
        scores=bytes_of(scores),
        seconds=start,
        cpu_seconds=processor,
    )


def blank_sample(config: ModelConfig, tokens: int) -> Sample:
    """A prompt of so many tokens; what its pictures are is said elsewhere, since only shapes matter."""
    return text_sample(np.zeros(tokens, np.int32), np.zeros((config.position_axes, tokens), np.int32), config.vision.patch_dim)


def blank_batch(engine: CompilingEngine, plan: Plan, samples: list[Sample], slots: int) -> Batch:
    """Samples as the engine takes them, with keep rules that say nothing."""
    batch = engine.ladders.batch.fit(len(samples))
    zeros, given = np.zeros(batch, np.int32), np.zeros((batch, slots), np.float32)
    limits = KeepLimits(np.float32(0), zeros, zeros, zeros, zeros, np.zeros((batch, slots), bool))
    return Batch(samples, plan, [CutInput(limits, given if SCORERS[cut.scorer].given else None) for cut in plan], zeros, batch, slots)


def decode(engine: CompilingEngine, prefix: Prefix, new: int, group: int = 1, logprobs: bool = False) -> int:
    """The first token and the others, for `group` rows behind every prompt, as `GlimpseVLM.generate` calls them. Returns: bytes of the
    caches on a chip."""
    count = prefix.logits.shape[0] * group
    settings = sampling_settings(engine.config, 0.0, 0, 1.0, 0, "auto", count)
    rows = Rows.behind(engine, prefix, settings, new, np.zeros(count, bool), new, logprobs)
    size = bytes_of([rows.state.new_kv, [(layer.key, layer.value) for layer in rows.kv]])
    rows.generate()
    return size
