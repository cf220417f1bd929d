"""Compiles a step of the stage `plus` for a TPU topology on a machine without a TPU: the rollout by the engine, then the update.

A step's arrays live as in `training.plus.step`: the rollout's pictures and all micro-batches stay until the update is done.

The gradient is one program with all layers unrolled, which takes the compiler hours and tens of gigabytes for large models. Its memory
grows by the same amount with every layer, so it is compiled for models of a few layers, and computed for the whole one.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gp_jax.ahead.compiling import GIB, Compiler, CompilingEngine, bytes_of, placed, plain, quiet, shortage
from gp_jax.ahead.generation import blank_batch, blank_sample, decode, label
from gp_jax.ahead.plus_fit import Phase, PlusFit, Questions
from gp_jax.ahead.topology import hbm_bytes
from gp_jax.ahead.training import STEPS, compile_step, needed, shape_of, started, training_mesh
from gp_jax.config.model import ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.models.adapter import AdapterConfig, attach
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.params import abstract_model
from gp_jax.processing.layout import slots_of
from gp_jax.pruning.plan import make_plan
from gp_jax.pruning.rule import Prune
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.plus.batches import Weighted, micro_batch
from gp_jax.training.plus.losses import METRICS, policy_losses
from gp_jax.training.plus.questions import Question
from gp_jax.training.plus.rollouts import Rollout
from gp_jax.training.plus.run import is_trained, ladders_of
from gp_jax.training.plus.settings import PlusConfig, PolicyConfig
from gp_jax.training.step import StepPrograms

ROLLOUT, ACCUMULATE, UPDATE = "rollout", "accumulate", "update"
FEW = 2  # layers of each kind (in front of the cut, behind it) by which the small models differ


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
    all_layers: bool = False,
    watch: Callable[[str], Any] = quiet,
) -> PlusFit:
    """Compiles what a step runs, with an adapter on all linear layers of the decoder and the other settings as `PlusConfig` has them.

    Args: beta: of the KL term, 0: without its pass; rank: of the adapter; all_layers: compile the update for the whole model; watch:
        program's name -> context around its compilation.
    Raises: GlimpseError when the topology is unknown, the batch does not divide over the devices, or a program cannot fit a chip at all.
    """
    policy = PolicyConfig(group_size=questions.group, max_new_tokens=questions.answer_tokens, beta=beta)
    settings = PlusConfig(
        adapter=AdapterConfig(r=rank), policy=policy, batch_size=questions.batch, accumulation=questions.accumulation, remat=remat
    )
    policy.check()
    mesh = training_mesh(topology, questions.batch, data, fsdp, tensor)
    model, step = policy_step(config, settings, mesh, dtype)
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
        models = [(config.text.num_hidden_layers, questions.after)] if all_layers else small_models(config, questions.after)
        phases += update_phases(engine, rollout, questions, models, lambda config: policy_step(config, settings, mesh, dtype)[1], watch)
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
        layers=tuple(depth for depth, _ in models),
        programs=compiler.programs_compiled(),
        **kept,
    )


def policy_step(config: ModelConfig, settings: PlusConfig, mesh: Mesh, dtype: str) -> tuple[LVLM, StepPrograms]:
    """A model of shapes with an adapter, and the step that trains it, as `run.build_plus` makes them."""
    assert settings.adapter is not None, "it is trained"
    model = placed(attach(abstract_model(config, None, jnp.dtype(dtype)), settings.adapter, abstract=True), mesh)
    step = StepPrograms(
        model,
        is_trained(settings),
        partial(policy_losses, config=settings.policy, remat=settings.remat, attention=settings.attention),
        METRICS,
        optimizer(settings.optim, STEPS),
        learning_rate(settings.optim, STEPS),
        mesh=mesh,
    )
    return model, step


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


def small_models(config: ModelConfig, after: int | None) -> list[tuple[int, int | None]]:
    """Depth and last layer in front of the cut of the models from whose memory that of a whole one is computed: the smallest, and one more
    for each kind of layers that the whole one has more of. A model that is small itself: that one."""
    depth = config.text.num_hidden_layers
    front, behind = (depth, 0) if after is None else (after + 1, depth - after - 1)
    if depth <= 4 * FEW:
        return [(depth, after)]
    least = min(front, FEW), min(behind, FEW)
    sizes = [least] + [(least[0] + FEW, least[1])] * (front > FEW) + [(least[0], least[1] + FEW)] * (behind > FEW)
    return [(sum(size), None if after is None else size[0] - 1) for size in sizes]


def whole(found: list[int], models: list[tuple[int, int | None]], depth: int, after: int | None) -> int:
    """What a whole model needs. found: what the models of `small_models` need."""

    def kinds(depth: int, after: int | None) -> np.ndarray:
        return np.array([1, depth if after is None else after + 1, 0 if after is None else depth - after - 1])

    # The least-squares solution of least norm: exact for the small models, and a kind of which all have the same number stays as it is.
    at = np.stack([kinds(*model) for model in models])
    change = np.linalg.lstsq((at - at[0])[:, 1:], np.array(found) - found[0], rcond=None)[0]
    return int(found[0] + (kinds(depth, after) - at[0])[1:] @ change)


def update_phases(
    engine: CompilingEngine,
    rollout: Rollout,
    questions: Questions,
    models: list[tuple[int, int | None]],
    make: Callable[[ModelConfig], StepPrograms],
    watch: Callable[[str], Any],
) -> list[Phase]:
    """Compiles the two programs of an update, with all micro-batches of the step in memory as in `step.PlusStep.updates`. models: depth and
    last layer in front of the cut of those to compile for; make: config -> their step."""
    compiler, count, config = engine.call, len(rollout.tokens), engine.config
    weighted = Weighted(np.zeros(count, np.float32), np.zeros((count, questions.answer_tokens), np.float32))
    parts = np.arange(len(rollout.questions)).reshape(-1, questions.batch).tolist()
    built = [micro_batch(engine, rollout, members, questions.batch, questions.answer_tokens, weighted) for members in parts]
    memories = []
    for depth, after in models:

        def watched(name: str, depth: int = depth) -> Any:
            compiler.own.current = f"{name}, {depth} layers"
            return watch(compiler.own.current)

        plan = () if after is None else (dataclasses.replace(built[0].plan[0], after=after),)
        step = make(dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=depth)))
        memories.append(compile_step(step, *started(step), plain(dataclasses.replace(built[0], plan=plan)), watched))
    phases, size = [], (models, config.text.num_hidden_layers, questions.after)
    for name, own in zip((ACCUMULATE, UPDATE), zip(*memories, strict=True), strict=True):
        total = compiler.held + whole([needed(memory) for memory in own], *size)
        temporary = whole([memory.temp_size_in_bytes for memory in own], *size)
        phases.append(Phase(name, total - compiler.weights - temporary, temporary, total))
    return phases
