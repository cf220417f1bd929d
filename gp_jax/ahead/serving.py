"""The programs of `gp-jax serve`, compiled for a topology: prompts of the longest kind, and every pool at its largest size.

Memory is that of a server with full caches: beside the weights and the program that runs there are all pools together, as `--kv-memory`
allows, the vision cache, and the prompt that is being read.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gp_jax.ahead.compiling import GIB, Compiler, CompilingEngine, OnChip, Program, Value, bytes_of, placed, quiet, shortage
from gp_jax.ahead.generation import blank_batch, blank_sample, explained, label, weight_bytes
from gp_jax.ahead.report import table
from gp_jax.ahead.topology import hbm_bytes, inference_mesh
from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.inference.decoding import Rows
from gp_jax.inference.requests import sampling_settings
from gp_jax.pretrained.params import abstract_model
from gp_jax.processing.layout import slots_of
from gp_jax.pruning.plan import Plan
from gp_jax.pruning.scorers.scorer import Cut
from gp_jax.serving.jobs import BEST
from gp_jax.serving.lengths import Lengths, lengths_of
from gp_jax.serving.pools import widened
from gp_jax.serving.settings import ServerSettings
from gp_jax.sharding import replicated


@dataclass(frozen=True)
class PoolFit:
    """A pool at its largest size. place: bytes of one place on a chip."""

    capacity: int
    places: int
    place: int
    runs: tuple[str, ...]  # programs, from a prompt to a step of this pool


@dataclass(frozen=True)
class ServingFit(OnChip):
    """The report of `compile_serving`. Bytes are per chip."""

    mesh: dict[str, int]
    prompt: int
    new_tokens: int
    weights: int
    caches: int  # of all pools together
    vision_cache: int
    hbm: int
    pools: tuple[PoolFit, ...]
    programs: tuple[Program, ...]
    seconds: float

    @property
    def room(self) -> int:
        """Bytes that the caches could take."""
        return max(0, self.caches + self.hbm - self.needed)


def compile_serving(
    config: ModelConfig,
    glimpse: GlimpseConfig,
    topology: str,
    settings: ServerSettings,
    *,
    sizes: dict[str, int] | None = None,
    lengths: Lengths | None = None,
    watch: Callable[[str], Any] = quiet,
    mesh: Mesh | None = None,
) -> ServingFit:
    """Compiles what a server with these settings runs for the longest prompt, dense and with a glimpse that leaves as much as each pool
    holds, and each pool's programs.

    Args: sizes: of the mesh, None: chosen; lengths: None: as the settings say; watch: program's name -> context around its compilation;
        mesh: instead of the topology's.
    Raises: GlimpseError when the topology is unknown, or a program cannot fit a chip at all.
    """
    kind, hbm = jnp.dtype(settings.dtype or "bfloat16"), hbm_bytes(topology)
    abstract = abstract_model(config, glimpse, kind)
    lengths = lengths or lengths_of(settings, config, kind.itemsize, glimpse.rows)
    most = max(own[-1] for own in lengths.sizes)
    mesh = mesh or inference_mesh(topology, sizes or {}, config.text, most, weight_bytes(abstract))
    model, slots = placed(abstract, mesh), slots_of(lengths.ladders.patches.rungs[-1], config)
    weights, vision_cache = bytes_of(nnx.state(model)), settings.bytes_of("vision_cache")
    if weights > hbm:
        raise GlimpseError(f"{topology}: the weights alone need {weights / GIB:.2f} GiB of {hbm / GIB:.2f} GiB per chip")
    compiler = Compiler(mesh, weights, label, watch, explained({lengths.ladders.prompt.rungs[-1]}, model, 1, mesh))
    shares = [place_bytes(CompilingEngine(model, lengths.ladders, mesh, compiler, 0, []), lengths, k) for k in range(len(lengths.place))]
    caches = max(lengths.budget * share // own for share, own in zip(shares, lengths.place, strict=True))

    def prompt(plan: Plan, kept: list[int]) -> tuple[CompilingEngine, Any]:
        engine = CompilingEngine(model, lengths.ladders, mesh, compiler, slots, kept)
        sample = blank_sample(config, settings.max_prompt)
        return engine, engine.prefix(engine.prefill(blank_batch(engine, plan, [sample], slots)))

    def other(size: int) -> Value:
        """Memory of what is not compiled here."""
        return Value((max(0, size),), np.dtype(np.uint8), replicated(mesh), compiler.memory)

    def pool(number: int | None) -> PoolFit | None:
        compiler.begin()
        try:
            if number is None:
                _held = other(caches + vision_cache)
                prompt((), [])
                return None
            capacity, places, share = lengths.capacities[number], lengths.sizes[number][-1], shares[number]
            held = other(caches + vision_cache)
            engine, prefix = prompt((Cut(glimpse.reduce_layer, "glimpse"),), [capacity])
            del held  # the pool's own memory is counted as such from here on
            _rest = other(caches - places * share + vision_cache)
            rows = empty(engine, capacity, places, lengths)
            rows.insert(
                type(prefix)(widened(engine, prefix.kv, capacity), prefix.logits, prefix.next_position),
                *(0, sampling_settings(config, 0.0, 0, 1.0, 0, "auto"), lengths.slots),
            )
            rows.generate()
            return PoolFit(capacity, places, share, tuple(dict.fromkeys(program.name for program in compiler.own.ran)))
        except Exception as error:
            if (short := shortage(error)) is None:
                raise
            raise GlimpseError(f"{topology}, program '{compiler.own.current}': {short}") from error

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:  # what they share is compiled once
        found = [*threads.map(pool, [None, *range(len(lengths.capacities))])]
    return ServingFit(
        mesh=dict(mesh.shape),
        prompt=settings.max_prompt,
        new_tokens=lengths.slots,
        weights=weights,
        caches=caches,
        vision_cache=vision_cache,
        hbm=hbm,
        pools=tuple(own for own in found if own is not None),
        programs=compiler.programs_compiled(),
        seconds=time.perf_counter() - start,
    )


def empty(engine: CompilingEngine, capacity: int, places: int, lengths: Lengths) -> Rows:
    """A pool's rows, as `serving.pools` makes them."""
    layers = engine.config.text.num_hidden_layers
    return Rows.empty(engine, places, [capacity] * layers, lengths.slots, logprobs=True, best=BEST)


def place_bytes(engine: CompilingEngine, lengths: Lengths, number: int) -> int:
    """Bytes on a chip of one of a pool's places: keys and values."""
    engine.call.begin()
    rows = empty(engine, lengths.capacities[number], lengths.sizes[number][-1], lengths)
    caches = [rows.state.new_kv, [(layer.key, layer.value) for layer in rows.kv]]
    return bytes_of(caches) // lengths.sizes[number][-1]


def verdict(fit: ServingFit) -> str:
    """A line that says whether the server fits the memory."""
    parts = f"weights {fit.weights / GIB:.2f}, caches {fit.caches / GIB:.2f}, vision cache {fit.vision_cache / GIB:.2f}"
    return f"{fit.verdict(parts)}; caches could take {fit.room / GIB:.2f} GiB a chip"


def report(fit: ServingFit, settings: ServerSettings, topology: str) -> str:
    """The whole report as text."""
    mesh = " ".join(f"{axis}={size}" for axis, size in fit.mesh.items())
    sizes = f"prompts up to {fit.prompt} tokens, {fit.new_tokens} new ones, caches {settings.kv_memory}"
    lines = [f"{settings.model} in {settings.dtype or 'bfloat16'} served on {topology} ({mesh}): {sizes}", ""]
    lines += table(fit.programs, {program.name: "" for program in fit.programs})
    lines += ["", f"{'pool':>12}{'places':>8}{'GiB a place':>13}{'GiB of all':>12}{'decode needs GiB':>18}"]
    step = {program.name: program.resident for program in fit.programs}
    for pool in fit.pools:
        needs = step[pool.runs[-1]] / GIB
        whole = pool.places * pool.place / GIB
        lines.append(f"{pool.capacity:>7} rows{pool.places:>8}{pool.place / GIB:>13.4f}{whole:>12.3f}{needs:>18.2f}")
    return "\n".join([*lines, "", f"compiled {len(fit.programs)} programs in {fit.seconds:.0f} s", verdict(fit)])


def facts(fit: ServingFit, settings: ServerSettings, topology: str) -> dict:
    """The whole report as JSON values."""
    return {"model": settings.model, "topology": topology, **asdict(fit), "needed": fit.needed, "fits": fit.fits, "room": fit.room}
