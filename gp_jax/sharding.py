"""Device meshes: one table defines how every kind of array is split.

Mesh axes: `data` (samples), `fsdp` (samples, and parameters at rest), `tensor` (heads, MLP and vocabulary; in vision towers windows).
"""

import fnmatch
import functools
import glob
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gp_jax.config.model import TextConfig
from gp_jax.errors import GlimpseError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Environment variables that TPU pods and cluster managers set when a process is one of several.
CLUSTER_SIGNS = ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE")
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # of a TPU VM that sets none of them; JAX then finds the other hosts by the VM's metadata

# Logical axis -> mesh axis, or axes.
RULES = {
    "batch": BATCH_AXES,
    "windows": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# Parameter path -> logical axes of its dimensions; the first match counts, no match means replicated.
PARAMETERS = (
    ("decoder.embed_tokens", ("vocab", "embed")),
    ("decoder.lm_head.weight", ("vocab", "embed")),
    ("decoder.*.self_attn.q_proj.weight", ("heads", "embed")),
    ("decoder.*.self_attn.q_proj.bias", ("heads",)),
    ("decoder.*.self_attn.[kv]_proj.weight", ("kv_heads", "embed")),
    ("decoder.*.self_attn.[kv]_proj.bias", ("kv_heads",)),
    ("decoder.*.self_attn.o_proj.weight", ("embed", "heads")),
    ("decoder.*.mlp.gate_proj.weight", ("mlp", "embed")),
    ("decoder.*.mlp.up_proj.weight", ("mlp", "embed")),
    ("decoder.*.mlp.down_proj.weight", ("embed", "mlp")),
    ("decoder.*.self_attn.q_proj.adapter.lora_B", ("heads", None)),
    ("decoder.*.self_attn.[kv]_proj.adapter.lora_B", ("kv_heads", None)),
    ("decoder.*.self_attn.o_proj.adapter.lora_A", (None, "heads")),
    ("decoder.*.mlp.gate_proj.adapter.lora_B", ("mlp", None)),
    ("decoder.*.mlp.up_proj.adapter.lora_B", ("mlp", None)),
    ("decoder.*.mlp.down_proj.adapter.lora_A", (None, "mlp")),
    ("decoder.*.adapter.lora_A", (None, "embed")),
    ("decoder.*.adapter.lora_B", ("embed", None)),
    ("vision.blocks.*.mlp.gate_proj.*", ("mlp", "embed")),
    ("vision.blocks.*.mlp.up_proj.*", ("mlp", "embed")),
    ("vision.blocks.*.mlp.down_proj.weight", ("embed", "mlp")),
    ("vision.blocks.*.mlp.*fc1.*", ("mlp", "embed")),
    ("vision.blocks.*.mlp.*fc2.weight", ("embed", "mlp")),
    ("vision.*.weight", (None, "embed")),
)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all by default). Raises: GlimpseError unless the sizes multiply to their number, and on several slices."""
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor != len(devices):
        raise GlimpseError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices, there are {len(devices)}"
        )
    if slices := len({getattr(device, "slice_index", 0) for device in devices}) - 1:
        raise GlimpseError(f"the devices are of {slices + 1} TPU slices; a mesh over more than one is not supported")
    # An axis may use part of a side of the chips' torus, e.g. tensor=8 on 4 x 4 chips, which `jax.make_mesh` refuses on some generations.
    grid = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def parameter_sharding(path: str, shape: tuple[int, ...], mesh: Mesh | None, text: TextConfig) -> jax.sharding.Sharding:
    """The sharding of a parameter. Dimensions that the mesh does not divide are replicated; a head is never split."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    logical = next((axes for pattern, axes in PARAMETERS if fnmatch.fnmatchcase(path, pattern)), ())
    units = {"heads": text.num_attention_heads, "kv_heads": text.num_key_value_heads}
    split = []
    for size, name in zip(shape, logical, strict=False):
        axis = RULES.get(name) if name else None
        parts = mesh.shape.get(axis, 1) if axis else 1
        if axis and units.get(str(name), size) % parts:
            if name == "kv_heads":
                _warn_once(f"{text.num_key_value_heads} key-value heads do not divide over tensor={parts}: they are replicated")
            axis = None
        split.append(axis)
    return NamedSharding(mesh, PartitionSpec(*split))


def batch_sharding(mesh: Mesh | None, samples: int, axis: int = 0) -> jax.sharding.Sharding:
    """Splits samples over `data` and `fsdp` if these divide their number, else replicates them. axis: the samples' axis."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    divides = samples % math.prod(mesh.shape[a] for a in BATCH_AXES) == 0
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH_AXES if divides else None))


def constrained(x: jax.Array, *logical: str | None) -> jax.Array:
    """Inside a program: x with its first dimensions split by RULES where the mesh divides them, the others replicated. Without a mesh: x.

    Arrays that go from one program to the next are constrained with it, so each program gets its inputs in one sharding and compiles once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {*MESH_AXES} <= {*mesh.axis_names}:
        return x
    split = []
    for size, name in zip(x.shape, logical, strict=False):
        axes = RULES.get(name, ()) if name else ()
        parts = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))
        split.append(axes if axes and size % parts == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*split))


def replicated(mesh: Mesh | None) -> jax.sharding.Sharding:
    """The same on every device."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())


def spread(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Makes global arrays of host values and random keys that are equal in every process."""

    def place(value: Any) -> jax.Array:
        if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(value)), impl=jax.random.key_impl(value))
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place, tree)


def put(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Places a host value on its devices, some of which may belong to other processes. (For those `jax.device_put` would exchange the value
    between processes to compare it.)"""
    return jax.device_put(value, sharding) if sharding.is_fully_addressable else spread(value, sharding)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def fetch(tree: Any, mesh: Mesh | None) -> Any:
    """Copies arrays to the host, complete in every process. If the mesh spans processes, all of them must call it."""
    if mesh is not None and mesh.is_multi_process:
        tree = _gather(mesh)(tree)  # a process can read only what its own devices hold
    return jax.tree.map(np.asarray, tree)


def has_others(*given: object) -> bool:
    """Whether this process is one of several, judged by the arguments of `start_processes` and by the machine."""
    on_tpu = importlib.util.find_spec("libtpu") is not None and any(glob.glob(pattern) for pattern in TPU_DEVICES)
    return on_tpu or any(value is not None for value in given) or any(name in os.environ for name in CLUSTER_SIGNS)


def start_processes(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of a run, before anything else touches JAX.

    Nothing to do for one process. TPU pods and cluster managers (Slurm's srun, MPI, GKE) need no arguments: JAX finds the others.
    Raises: GlimpseError when they cannot be joined.
    """
    given = (coordinator, processes, process)
    if len({value is None for value in given}) > 1:
        raise GlimpseError("mesh: coordinator, processes and process must be given together")
    if not has_others(*given):
        return
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise GlimpseError(f"mesh: the processes of this run could not be joined ({' '.join(str(error).split())[:200]})") from error


def wait_for_all(name: str, hours: float = 24) -> None:
    """A barrier: returns when every process of the run has called it; at once in a single process. name: unique in a run."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost  # waits at the coordinator: slow processes do not time out there, as they do in collectives

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(hours * 3_600_000))


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The sizes, with -1 (at most one) replaced by what the others leave. Raises: GlimpseError when they do not divide the devices."""
    sizes = (data, fsdp, tensor)
    known = math.prod(size for size in sizes if size != -1)
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise GlimpseError(f"mesh data={data} x fsdp={fsdp} x tensor={tensor}: sizes are positive, at most one is -1")
    if -1 in sizes and devices % known:
        raise GlimpseError(f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not divide {devices} devices")
    data, fsdp, tensor = (devices // known if size == -1 else size for size in sizes)
    return data, fsdp, tensor
