"""Compiles the training step for a TPU topology on a machine without a TPU, to know that it fits before renting one."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gp_jax.ahead.compiling import bytes_of, placed, quiet, shortage
from gp_jax.ahead.topology import hbm_bytes, topology_devices
from gp_jax.config.model import ModelConfig
from gp_jax.data.collate import Shape, TrainSample, train_batch
from gp_jax.data.shapes import round_up
from gp_jax.errors import GlimpseError
from gp_jax.ops.target import targeting
from gp_jax.pretrained.params import abstract_model
from gp_jax.processing.layout import rope_positions, text_sample
from gp_jax.processing.windows import pack_windows
from gp_jax.sharding import batch_sharding, make_mesh, mesh_sizes
from gp_jax.training.build import glimpse_config
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.settings import GlimpseSettings, LossConfig, OptimConfig
from gp_jax.training.step import Counts, Gathered, StepPrograms, TrainingStep, TrainState
from gp_jax.trees import TrainBatch

STEPS = 1000  # length of the learning-rate schedule, which no shape depends on


@dataclass(frozen=True)
class Fit:
    """The memory that a compiled step needs, in bytes per chip."""

    seconds: float
    arguments: int
    temporary: int
    total: int
    limit: int
    chips: int
    shape: Shape

    @property
    def fits(self) -> bool:
        """Whether it fits the chip's memory."""
        return self.total <= self.limit


def shape_of(config: ModelConfig, visual_tokens: int, prompt_tokens: int, tail: int) -> Shape:
    """The lengths of a sample with one picture, as records are padded to them. tail: rows behind the prompt."""
    side = config.vision.window_side
    columns = max(side, int(visual_tokens**0.5) // side * side)
    slots, _ = pack_windows([(-(-visual_tokens // columns), columns)], side)
    return Shape(round_up(max(slots.size, visual_tokens), side * side), round_up(visual_tokens + prompt_tokens), round_up(tail))


def example(config: ModelConfig, batch: int, shape: Shape, rows: int) -> TrainBatch:
    """A batch of abstract arrays, with shapes and no values. rows: of the glimpse."""
    image_token = np.full(3, -1)  # the shapes come from `shape`, so a sample without pictures suffices
    sample = text_sample(np.zeros(3, np.int32), rope_positions(image_token, (), config.position_axes), config.vision.patch_dim)
    empty = train_batch([TrainSample(sample, np.zeros(1, np.int32), np.zeros(0, bool))], config, 1, shape, rows, [0])
    batched = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty)

    def widen(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = 1 if path[-1].name == "positions" else 0
        return jax.ShapeDtypeStruct((*leaf.shape[:axis], batch, *leaf.shape[axis + 1 :]), leaf.dtype)

    return jax.tree_util.tree_map_with_path(widen, batched)


def training_mesh(topology: str, batch: int, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over a topology. Raises: GlimpseError when it is unknown, or the batch does not divide over the devices."""
    devices = topology_devices(topology)
    mesh = make_mesh(*mesh_sizes(data, fsdp, tensor, len(devices)), devices=devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % parts:
        raise GlimpseError(f"--batch {batch} is not a multiple of data x fsdp = {parts}")
    return mesh


def started(step: StepPrograms) -> tuple[TrainState, Gathered]:
    """What `StepPrograms.start` makes, as shapes with their places."""
    count, number, rng = np.int32(0), np.float32(0), np.zeros(2, np.uint32)
    state = TrainState(step.params, jax.eval_shape(step.optimizer.init, step.params), count, count, rng)
    made = state, Gathered(step.params, dict.fromkeys(step.metrics, number))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), made, step.places)


def compile_step(step: StepPrograms, state: TrainState, gathered: Gathered, batch: Any, watch: Callable[[str], Any] = quiet) -> list[Any]:
    """Compiles both programs of a step. Returns: what each needs of a chip's memory, `accumulate` first. Raises: the compiler's errors."""
    assert step.mesh is not None, "a topology has a mesh"
    number, found = next(iter(gathered.sums.values())), []
    arguments = {
        "accumulate": (gathered, state.params, step.frozen, batch, Counts(number, number), state.step, state.rng),
        "update": (state, gathered),
    }
    for name, given in arguments.items():
        with watch(name), targeting("tpu"), jax.set_mesh(step.mesh):
            memory = step.programs[name].lower(*given).compile().memory_analysis()
        assert memory is not None, "the TPU compiler reports memory"
        found.append(memory)
    return found


def needed(memory: Any) -> int:
    """Bytes on a chip that a program needs beside its arguments: temporary ones, outputs that take no argument's place, and its code."""
    unaliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + unaliased + memory.generated_code_size_in_bytes


def compile_training(
    config: ModelConfig,
    topology: str,
    *,
    batch: int,
    visual_tokens: int,
    prompt_tokens: int = 64,
    answer_tokens: int = 32,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    dtype: str = "bfloat16",
    remat: bool = True,
) -> Fit:
    """Compiles both programs of the training step for a topology, with the released settings.

    Raises: GlimpseError when the topology is unknown, the batch does not divide over the devices, or the programs do not fit the memory.
    """
    mesh = training_mesh(topology, batch, data, fsdp, tensor)
    glimpse = glimpse_config(GlimpseSettings(), config)
    model = placed(abstract_model(config, glimpse, jnp.dtype(dtype)), mesh)
    optim = OptimConfig()
    step = TrainingStep(model, optimizer(optim, STEPS), learning_rate(optim, STEPS), LossConfig(), mesh=mesh, remat=remat)
    state, gathered = started(step)
    shape = shape_of(config, visual_tokens, prompt_tokens, max(1, glimpse.rows) + answer_tokens)

    def split(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = 1 if path[-1].name == "positions" else 0
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh, batch, axis))

    start = time.perf_counter()
    try:
        memory = compile_step(step, state, gathered, jax.tree_util.tree_map_with_path(split, example(config, batch, shape, glimpse.rows)))[
            0
        ]
    except Exception as error:
        if (short := shortage(error)) is None:
            raise
        raise GlimpseError(f"the training step on {topology} {short}") from error
    # The optimiser's state stays in memory while gradients are accumulated.
    arguments = memory.argument_size_in_bytes + bytes_of(state.opt)
    seconds, limit = time.perf_counter() - start, hbm_bytes(topology)
    return Fit(seconds, arguments, memory.temp_size_in_bytes, arguments + needed(memory), limit, mesh.size, shape)


def facts(fit: Fit) -> dict:
    """The facts as JSON values."""
    return dataclasses.asdict(fit) | {"fits": fit.fits}


def report(fit: Fit) -> str:
    """The facts as text."""
    gib = {name: getattr(fit, name) / 2**30 for name in ("arguments", "temporary", "total", "limit")}
    rows = f"{fit.shape.slots} visual, {fit.shape.prompt} prompt, {fit.shape.tail} answer"
    return (
        f"compiled for {fit.chips} chips in {fit.seconds:.0f} s; rows per sample: {rows}\n"
        f"HBM per chip  {gib['total']:.2f} GiB of {gib['limit']:.2f} GiB: {'fits' if fit.fits else 'DOES NOT FIT'}\n"
        f"  weights, optimiser, batch  {gib['arguments']:.2f} GiB\n"
        f"  temporary                  {gib['temporary']:.2f} GiB"
    )
