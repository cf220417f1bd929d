"""Static lengths of a server: ladders of its programs, and sizes of its pools."""

from dataclasses import dataclass

from gp_jax.buckets import Ladder, Ladders
from gp_jax.config.model import ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.serving.settings import ServerSettings

STEP = 16  # of lengths of prompts and caches
LEAST = {"prompt": 64, "patches": 256, "cache": 128}  # about the smallest rungs
SMALL = 512  # decoder width up to which a program takes longer to compile than many requests save by a closer fit
SPARE = 1.25  # patches beyond those of a prompt's visual tokens: windows are padded


@dataclass(frozen=True)
class Density:
    """How many rungs there are. parts: of every halving of prompts and patches; fold: from one pool's capacity to the next, and from one
    size of a pool to the next."""

    parts: int
    fold: int


DENSITIES = {"few": Density(1, 4), "many": Density(2, 2)}


@dataclass(frozen=True)
class Lengths:
    """ladders: of the engine that reads prompts, one at a time. capacities: rows of cache of a prompt, per pool. sizes: that every pool may
    have, within its memory. place: bytes of one place of every pool. slots: new tokens of a row. budget: bytes of all pools."""

    ladders: Ladders
    capacities: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    place: tuple[int, ...]
    slots: int
    budget: int


def up(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def rungs(longest: int, least: int, multiple: int, parts: int = 1, fold: int = 2) -> tuple[int, ...]:
    """Lengths from `longest` down to about `least`, each `fold` times the one below it and that range in equal `parts`. They are counted
    from the top: a last rung just above the one before would be a program for nothing."""
    found, top = {longest}, longest
    while top >= fold * least:
        low = -(-top // fold)
        found |= {up(low + (top - low) * part // parts, multiple) for part in range(parts)}
        top = low
    return tuple(sorted(found))


def lengths_of(settings: ServerSettings, config: ModelConfig, itemsize: int, glimpse_rows: int) -> Lengths:
    """The lengths for a model. itemsize: bytes of a number in a cache. Raises: GlimpseError that names the option at fault."""
    density = DENSITIES[settings.rungs or ("few" if config.text.hidden_size <= SMALL else "many")]
    longest = up(settings.max_prompt + glimpse_rows, STEP)
    capacities = settings.capacities or rungs(longest, LEAST["cache"], STEP, fold=density.fold)
    if capacities[-1] < longest:
        raise GlimpseError(f"--capacities end at {capacities[-1]}; the longest prompt needs {longest} (--max-prompt)")
    window = config.vision.window_side**2 * config.vision.merge_unit
    patches = max(LEAST["patches"], window, up(int(settings.max_prompt * config.vision.merge_unit * SPARE), 64))
    ladders = Ladders(
        patches=Ladder("patches", rungs(patches, max(LEAST["patches"], window), 64, density.parts)),
        prompt=Ladder("prompt", rungs(longest, LEAST["prompt"], STEP, density.parts)),
        kept=Ladder("kept", capacities),
        decode=Ladder("decode", (settings.max_new_tokens,)),
        batch=Ladder("batch", (1,)),
    )
    text, budget = config.text, settings.bytes_of("kv_memory")
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize
    place = tuple(row * (capacity + settings.max_new_tokens) for capacity in capacities)
    if place[-1] > budget:
        raise GlimpseError(
            f"--kv-memory {settings.kv_memory} does not hold one prompt of {capacities[-1]} rows and {settings.max_new_tokens} new tokens, "
            f"which takes {place[-1] / 2**20:.0f} MiB"
        )
    most = [min(settings.max_rows, budget // own) for own in place]
    sizes = tuple(tuple(sorted({*(rows for n in range(10) if (rows := density.fold**n) < limit), limit})) for limit in most)
    return Lengths(ladders, capacities, sizes, place, settings.max_new_tokens, budget)
