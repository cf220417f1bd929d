"""Compiles a step of the stage `plus` for a TPU topology on a machine without a TPU: the rollout by the engine, then the update.

A step's arrays live as in `training.plus.step`: the rollout's pictures and all micro-batches stay until the update is done.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gp_jax.ahead.compiling import Compiler, CompilingEngine, Program, bytes_of, placed, plain, quiet, shortage
from gp_jax.ahead.generation import Request, blank_batch, blank_sample, decode, label
from gp_jax.ahead.topology import hbm_bytes
from gp_jax.ahead.training import STEPS, compile_step, needed, shape_of, started, training_mesh
from gp_jax.config.model import ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.models.adapter import AdapterConfig, attach
from gp_jax.pretrained.params import abstract_model
from gp_jax.processing.layout import slots_of
from gp_jax.pruning.plan import make_plan
from gp_jax.pruning.rule import Prune
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.plus.batches import Weighted, micro_batch
from gp_jax.training.plus.losses import METRICS, policy_losses
from gp_jax.training.plus.rollouts import Question, Rollout
from gp_jax.training.plus.run import is_trained, ladders_of
from gp_jax.training.plus.settings import PlusConfig, PolicyConfig
from gp_jax.training.step import Gathered, StepPrograms, TrainState

ROLLOUT, ACCUMULATE, UPDATE = "rollout", "accumulate", "update"
GIB = 2**30


@dataclass(frozen=True)
class Questions(Request):
    """A step of equal questions. batch: of a micro-batch; accumulation: micro-batches of a step, all of whose questions are answered
    together; group: completions of a question; after: last layer that sees every visual token, None: nothing is cut."""

    accumulation: int = 1
    group: int = 8
    after: int | None = None

    @property
    def kept(self) -> int:
        """Visual tokens that completions see."""
        return self.visual_tokens if self.after is None else int(self.retention * self.visual_tokens)


@dataclass(frozen=True)
class Phase:
    """What is on a chip in a part of a step, in bytes, beside weights and trained parameters."""

    name: str
    values: int  # what the program reads and what is kept for later programs
    temporary: int
    total: int  # weights and trained parameters too
    most: str = ""  # the program at which it is most


@dataclass(frozen=True)
class PlusFit:
    """The memory that a step needs, in bytes per chip."""

    seconds: float
    mesh: dict[str, int]
    limit: int
    questions: Questions
    lengths: dict[str, int]  # rows of a question that the programs are for
    beta: float
    rank: int
    parameters: int  # of the adapter, of all chips
    base: int
    adapter: int  # two copies: as it was at the start, which `StepPrograms.params` holds, and as it is now
    optimizer: int
    gradients: int
    phases: tuple[Phase, ...]
    programs: tuple[Program, ...]  # of the rollout

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.mesh.values())

    @property
    def held(self) -> int:
        """What stays on a chip through all steps."""
        return self.base + self.adapter + self.optimizer + self.gradients

    @property
    def total(self) -> int:
        """The most that is on a chip at any time."""
        return max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether it fits the chip's memory."""
        return self.total <= self.limit


def compile_plus(
    config: ModelConfig,
    topology: str,
    questions: Questions,
    *,
    beta: float = 0.0,
    rank: int = 32,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    dtype: str = "bfloat16",
    remat: bool = True,
    watch: Callable[[str], Any] = quiet,
) -> PlusFit:
    """Compiles what a step runs, with an adapter on all linear layers of the decoder and the other settings as `PlusConfig` has them.

    Args: beta: of the KL term, 0: without its pass; rank: of the adapter; watch: program's name -> context around its compilation.
    Raises: GlimpseError when the topology is unknown, the batch does not divide over the devices, or a program cannot fit a chip at all.
    """
    policy = PolicyConfig(group_size=questions.group, max_new_tokens=questions.answer_tokens, beta=beta)
    settings = PlusConfig(
        adapter=AdapterConfig(r=rank), policy=policy, batch_size=questions.batch, accumulation=questions.accumulation, remat=remat
    )
    policy.check()
    mesh = training_mesh(topology, questions.batch, data, fsdp, tensor)
    assert settings.adapter is not None, "it is trained"
    model = attach(abstract_model(config, None, jnp.dtype(dtype)), settings.adapter, abstract=True)
    model = placed(model, mesh)
    step = StepPrograms(
        model,
        is_trained(settings),
        partial(policy_losses, config=policy, remat=remat, attention=settings.attention),
        METRICS,
        optimizer(settings.optim, STEPS),
        learning_rate(settings.optim, STEPS),
        mesh=mesh,
    )
    state, gathered = started(step)
    kept = dict(base=bytes_of(step.frozen), adapter=bytes_of((step.params, state.params)), optimizer=bytes_of(state.opt))
    kept |= dict(gradients=bytes_of(gathered.grads))
    held, limit, start = sum(kept.values()), hbm_bytes(topology), time.perf_counter()
    if held > limit:
        raise GlimpseError(f"{topology}: weights, adapter and optimiser alone need {held / GIB:.2f} GiB of {limit / GIB:.2f} GiB per chip")
    shape = shape_of(config, questions.visual_tokens, questions.prompt_tokens, 1)
    ladders = ladders_of([shape], config.vision.merge_unit, settings)
    rows = questions.prompt_tokens + questions.kept
    compiler, slots = Compiler(mesh, held, label, watch, {}), slots_of(ladders.patches.rungs[-1], config)
    engine = CompilingEngine(model, ladders, mesh, compiler, slots, [rows])
    compiler.begin()
    phases: list[Phase] = []
    try:
        rollout = answer(engine, questions)
        phases += [rollout_phase(compiler)]
        phases += update_phases(engine, step, (state, gathered), rollout, questions, watch)
    except Exception as error:
        if (short := shortage(error)) is None:
            raise
        before = f"; the rollout needs {phases[0].total / GIB:.2f} GiB" if phases else ""
        raise GlimpseError(f"{topology}, program '{compiler.own.current}': {short}{before}") from error
    return PlusFit(
        seconds=time.perf_counter() - start,
        mesh=dict(mesh.shape),
        limit=limit,
        questions=questions,
        lengths={"visual": slots, "prompt": shape.prompt, "kept": ladders.kept_for(rows, shape.prompt)},
        beta=beta,
        rank=rank,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(step.params)),
        phases=tuple(phases),
        programs=compiler.programs_compiled(),
        **kept,
    )


def answer(engine: CompilingEngine, questions: Questions) -> Rollout:
    """The rollout, as `rollouts.Roller.answer` calls the engine."""
    count, vision = questions.batch * questions.accumulation, questions.visual_tokens
    depth, nothing = engine.config.text.num_hidden_layers, cast(Any, None)
    plan = () if questions.after is None else make_plan(Prune(reference_masks=(), after=questions.after), None, depth)
    batch = blank_batch(engine, plan, [blank_sample(engine.config, questions.prompt_tokens + vision)] * count, engine.slots)
    view = engine.view(batch)
    decode(engine, engine.prefix(engine.prefill(batch, view=view)), questions.answer_tokens, questions.group, logprobs=True)
    completion = np.zeros(questions.answer_tokens)
    return Rollout(
        questions=[Question(nothing, nothing, 0, number) for number in range(count)],
        masks=[np.arange(vision) < questions.kept] * count,
        batch=batch,
        view=view,
        tokens=[completion] * count * questions.group,
        sampled=[completion] * count * questions.group,
        cut=[False] * count * questions.group,
    )


def rollout_phase(compiler: Compiler) -> Phase:
    """What the rollout's largest program finds on a chip."""
    most = max(compiler.programs_compiled(), key=lambda program: program.resident)
    return Phase(ROLLOUT, most.resident - compiler.weights - most.temporary, most.temporary, most.resident, most.name)


def update_phases(
    engine: CompilingEngine,
    step: StepPrograms,
    start: tuple[TrainState, Gathered],
    rollout: Rollout,
    questions: Questions,
    watch: Callable[[str], Any],
) -> list[Phase]:
    """Compiles the two programs of an update, with all micro-batches of the step in memory as in `step.PlusStep.updates`."""
    compiler, count = engine.call, len(rollout.tokens)
    weighted = Weighted(np.zeros(count, np.float32), np.zeros((count, questions.answer_tokens), np.float32))
    parts = np.arange(len(rollout.questions)).reshape(-1, questions.batch).tolist()
    built = [micro_batch(engine, rollout, members, questions.batch, questions.answer_tokens, weighted) for members in parts]

    def watched(name: str) -> Any:
        compiler.own.current = name
        return watch(name)

    memories, phases = compile_step(step, *start, plain(built[0]), watched), []
    for name, memory in zip((ACCUMULATE, UPDATE), memories, strict=True):
        total, temporary = compiler.held + needed(memory), memory.temp_size_in_bytes
        phases.append(Phase(name, total - compiler.weights - temporary, temporary, total))
    return phases


def facts(fit: PlusFit) -> dict:
    """The facts as JSON values."""
    return dataclasses.asdict(fit) | {"held": fit.held, "total": fit.total, "fits": fit.fits}


def report(fit: PlusFit) -> str:
    """The facts as text."""
    asked, mesh = fit.questions, " ".join(f"{axis}={size}" for axis, size in fit.mesh.items())
    rows = f"{fit.lengths['visual']} visual, {fit.lengths['prompt']} prompt, {fit.lengths['kept']} kept, {asked.answer_tokens} answer"
    step = f"{asked.batch} questions" + (f" x {asked.accumulation} micro-batches" if asked.accumulation > 1 else "")
    kl = f"with the KL pass (beta {fit.beta})" if fit.beta else "without a KL pass"
    lines = [
        f"compiled for {fit.chips} chips ({mesh}) in {fit.seconds:.0f} s; rows per question: {rows}",
        f"a step: {step} x {asked.group} completions, {kl}; adapter of rank {fit.rank}, {fit.parameters / 1e6:.1f} M parameters",
        f"HBM per chip  {fit.total / GIB:.2f} GiB of {fit.limit / GIB:.2f} GiB: {'fits' if fit.fits else 'DOES NOT FIT'}",
        "  always",
        f"    base weights               {fit.base / GIB:.2f} GiB",
        f"    adapter, twice             {fit.adapter / GIB:.2f} GiB",
        f"    optimiser, gradients       {(fit.optimizer + fit.gradients) / GIB:.2f} GiB",
    ]
    for phase in fit.phases:
        words = f" (most while '{phase.most}' runs)" if phase.most else ""
        sizes = f"{phase.values / GIB:.2f} GiB of values, {phase.temporary / GIB:.2f} GiB temporary"
        lines.append(f"  {phase.name:<11} {phase.total / GIB:.2f} GiB: {sizes}{words}")
    return "\n".join(lines)
