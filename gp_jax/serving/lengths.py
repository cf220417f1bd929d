"""Static lengths of a server: ladders of its programs, and sizes of its pools."""

from dataclasses import dataclass

from gp_jax.buckets import Ladder, Ladders, octaves
from gp_jax.config.model import ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.serving.settings import ServerSettings

PARTS = 2  # rungs of an octave of prompts and patches
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sizes that a pool may have
SPARE = 1.25  # patches beyond those of a prompt's visual tokens: windows are padded


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


def lengths_of(settings: ServerSettings, config: ModelConfig, itemsize: int, glimpse_rows: int) -> Lengths:
    """The lengths for a model. itemsize: bytes of a number in a cache. Raises: GlimpseError that names the option at fault."""
    longest = settings.max_prompt + glimpse_rows
    prompt = octaves("prompt", min(64, longest), longest, parts=PARTS, multiple=16)
    capacities = settings.capacities
    if not capacities:
        doubled = [rung for rung in (128 << n for n in range(24)) if rung < longest]
        capacities = (*doubled, longest)
    if capacities[-1] < longest:
        raise GlimpseError(f"--capacities end at {capacities[-1]}; the longest prompt needs {longest} (--max-prompt)")
    patches = int(settings.max_prompt * config.vision.merge_unit * SPARE)
    window = config.vision.window_side**2 * config.vision.merge_unit
    first = min(max(256, window), patches)
    ladders = Ladders(
        patches=octaves("patches", first, max(first, patches), parts=PARTS, multiple=64),
        prompt=prompt,
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
    sizes = tuple(tuple(sorted({*(rows for rows in ROWS if rows < limit), limit})) for limit in most)
    return Lengths(ladders, capacities, sizes, place, settings.max_new_tokens, budget)
