"""Compiles the training step for a TPU topology on a machine without a TPU, to know that it fits before renting one."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gp_jax.ahead.compiling import shortage
from gp_jax.ahead.topology import hbm_bytes, topology_devices
from gp_jax.config.model import ModelConfig
from gp_jax.data.collate import Shape, TrainSample, train_batch
from gp_jax.data.shapes import round_up
from gp_jax.errors import GlimpseError
from gp_jax.ops.target import targeting
from gp_jax.pretrained.params import abstract_model
from gp_jax.processing.layout import Sample, pack_windows, rope_positions
from gp_jax.sharding import batch_sharding, make_mesh, mesh_sizes, parameter_sharding, replicated
from gp_jax.training.build import glimpse_config
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.settings import GlimpseSettings, LossConfig, OptimConfig
from gp_jax.training.step import METRICS, Counts, Gathered, TrainingStep, TrainState
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


def example(
    config: ModelConfig, batch: int, visual_tokens: int, prompt_tokens: int, answer_tokens: int, rows: int
) -> tuple[TrainBatch, Shape]:
    """A batch of abstract arrays, with shapes and no values."""
    side = config.vision.window_side
    columns = max(side, int(visual_tokens**0.5) // side * side)
    grid = (-(-visual_tokens // columns), columns)
    slots, _ = pack_windows([grid], side)
    shape = Shape(
        round_up(max(slots.size, visual_tokens), side * side),
        round_up(visual_tokens + prompt_tokens),
        round_up(max(1, rows) + answer_tokens),
    )
    image_token = np.full(3, -1)  # the shapes come from `shape`, so a sample without pictures suffices
    sample = Sample(
        np.zeros(3, np.int32),
        rope_positions(image_token, (), config.position_axes),
        image_token,
        (),
        np.zeros((0, config.vision.patch_dim), np.float32),
        *(np.zeros(0, np.int32),) * 3,
    )
    empty = train_batch([TrainSample(sample, np.zeros(1, np.int32), np.zeros(0, bool))], config, 1, shape, rows, [0])
    batched = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty)

    def widen(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = 1 if path[-1].name == "positions" else 0
        return jax.ShapeDtypeStruct((*leaf.shape[:axis], batch, *leaf.shape[axis + 1 :]), leaf.dtype)

    return jax.tree_util.tree_map_with_path(widen, batched), shape


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
    devices = topology_devices(topology)
    mesh = make_mesh(*mesh_sizes(data, fsdp, tensor, len(devices)), devices=devices)
    glimpse = glimpse_config(GlimpseSettings(), config)
    model = abstract_model(config, glimpse, jnp.dtype(dtype))
    optim = OptimConfig()
    step = TrainingStep(model, optimizer(optim, STEPS), learning_rate(optim, STEPS), LossConfig(), mesh=mesh, remat=remat)
    whole = replicated(mesh)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

    params = placed(step.params)

    def sharded(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        sharding = parameter_sharding(".".join(map(str, path)), variable.shape, mesh, config.text)
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding))

    frozen = [(path, sharded(path, variable)) for path, variable in nnx.to_flat_state(step.frozen)]
    scalar = {kind: jax.ShapeDtypeStruct((), kind, sharding=whole) for kind in (jnp.int32, jnp.float32)}
    rng = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
    state = TrainState(params, placed(jax.eval_shape(step.optimizer.init, params)), scalar[jnp.int32], scalar[jnp.int32], rng)
    gathered = Gathered(params, dict.fromkeys(METRICS, scalar[jnp.float32]))
    abstract, shape = example(config, batch, visual_tokens, prompt_tokens, answer_tokens, glimpse.rows)

    def split(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = 1 if path[-1].name == "positions" else 0
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh, batch, axis))

    parts = int(np.prod([mesh.shape[axis] for axis in ("data", "fsdp")]))
    if batch % parts:
        raise GlimpseError(f"--batch {batch} is not a multiple of data x fsdp = {parts}")
    counts = Counts(scalar[jnp.float32], scalar[jnp.float32])
    start = time.perf_counter()
    try:
        with targeting("tpu"), jax.set_mesh(mesh):
            lowered = step.programs["accumulate"].lower(
                gathered,
                params,
                nnx.from_flat_state(frozen),
                jax.tree_util.tree_map_with_path(split, abstract),
                counts,
                state.step,
                state.rng,
            )
            compiled = lowered.compile()
            step.programs["update"].lower(state, gathered).compile()
    except Exception as error:
        if (short := shortage(error)) is None:
            raise
        raise GlimpseError(f"the training step on {topology} {short}") from error
    memory = compiled.memory_analysis()
    assert memory is not None, "the TPU compiler reports memory"
    opt_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt))
    arguments = memory.argument_size_in_bytes + opt_bytes  # the optimiser's state stays in memory while gradients are accumulated
    unaliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + memory.temp_size_in_bytes + unaliased + memory.generated_code_size_in_bytes
    seconds = time.perf_counter() - start
    return Fit(seconds, arguments, memory.temp_size_in_bytes, total, hbm_bytes(topology), mesh.size, shape)


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
