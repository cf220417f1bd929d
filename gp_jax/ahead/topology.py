"""TPU topologies by name, the memory of their chips, and the default mesh for generation on them."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from gp_jax.config.model import TextConfig
from gp_jax.errors import GlimpseError
from gp_jax.sharding import MESH_AXES, make_mesh, mesh_sizes

WEIGHTS_SHARE = 0.6  # largest share of a chip's memory for weights; beyond it the model is split further


@dataclass(frozen=True)
class ChipGeneration:
    """A TPU generation. hbm_gib: memory that programs can use per device, according to the compiler. examples: existing slices. options:
    compiler options, if the defaults are not how the generation is used."""

    hbm_gib: float
    examples: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
GENERATIONS = {
    "v4": ChipGeneration(30.75, CUBES, (("chip_config_name", "megacore"),)),  # one device per chip instead of one per core
    "v5e": ChipGeneration(15.75, FLAT),
    "v5p": ChipGeneration(95.74, CUBES),
    "v6e": ChipGeneration(31.25, FLAT),
}


def known() -> str:
    """A text with the known topologies, for messages."""
    return "; ".join(f"{name}: {' '.join(generation.examples)} ..." for name, generation in GENERATIONS.items())


def generation_of(topology: str) -> ChipGeneration:
    """The generation of a topology such as v5e:2x4. Raises: GlimpseError that lists the known ones."""
    name, _, chips = topology.lower().partition(":")
    if name not in GENERATIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", chips):
        raise GlimpseError(f"--topology {topology}: is not GENERATION:CHIPS of a known TPU ({known()})")
    return GENERATIONS[name]


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology, one per chip. Raises: GlimpseError for an unknown topology, or when the compiler is not installed."""
    from jax.experimental import topologies

    generation = generation_of(topology)
    topology = topology.lower()
    sides = [int(n) for n in topology.partition(":")[2].split("x")]
    options: dict[str, Any] = dict(generation.options)
    if sides[0] % 2 or sides[1] % 2:  # a host has 2x2 chips; a smaller slice is a part of one host
        options["chips_per_host_bounds"] = [*sides, 1][:3] if math.prod(sides) == 1 else None
    try:
        if options.get("chips_per_host_bounds", True) is None:
            raise ValueError("its sides must be even")
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except Exception as error:  # the TPU plugin raises many kinds of errors
        reason = " ".join(str(error).split())[:200]
        missing = "libtpu" in reason or "plugin" in reason.lower()
        hint = 'is the TPU compiler installed? pip install "gp_jax[tpu]"' if missing else f"known: {known()}"
        raise GlimpseError(f"--topology {topology}: the TPU compiler does not know this topology ({reason}); {hint}") from error


def hbm_bytes(topology: str) -> int:
    """Memory that programs can use on a chip, in bytes."""
    return int(generation_of(topology).hbm_gib * 2**30)


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,tensor=4" -> sizes. Raises: GlimpseError on other axes or sizes."""
    sizes = {}
    for item in text.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if axis not in MESH_AXES or axis in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise GlimpseError(f"--mesh {text}: is not like data=2,fsdp=1,tensor=4 (axes {', '.join(MESH_AXES)}; -1: all that remain)")
        sizes[axis] = int(size)
    return sizes


def choose_sizes(text: TextConfig, chips: int, batch: int, weights: int, hbm: int) -> tuple[int, int, int]:
    """Sizes of data, fsdp and tensor for generation. `tensor` is the number of key-value heads, and larger if weights would not fit or the
    batch would not divide over the remaining chips; `fsdp` is used if no size of `tensor` is enough.

    Args: weights: bytes of the whole model; hbm: bytes of a chip.
    """
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    widths = [n for n in range(1, chips + 1) if chips % n == 0 and heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    least = max(n for n in widths if kv_heads % n == 0)
    fits = [n for n in widths if n >= least and weights / n <= WEIGHTS_SHARE * hbm]
    if not fits:
        return 1, chips // widths[-1], widths[-1]
    tensor = next((n for n in fits if batch % (chips // n) == 0), fits[0])
    return chips // tensor, 1, tensor


def inference_mesh(topology: str, sizes: dict[str, int], text: TextConfig, batch: int, weights: int) -> Mesh:
    """A mesh over a topology. sizes: requested sizes by axis; other axes have size 1; empty: `choose_sizes` decides.

    Raises: GlimpseError when the sizes do not fit the chips.
    """
    devices = topology_devices(topology)
    if sizes:
        left = 1 if -1 in sizes.values() or "data" in sizes else -1
        data, fsdp, tensor = mesh_sizes(sizes.get("data", left), sizes.get("fsdp", 1), sizes.get("tensor", 1), len(devices))
    else:
        data, fsdp, tensor = choose_sizes(text, len(devices), batch, weights, hbm_bytes(topology))
    return make_mesh(data, fsdp, tensor, devices=devices)
