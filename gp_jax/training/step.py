"""The training step as two programs: `accumulate` (one per bucket shape) adds a micro-batch's gradients, `update` applies them.

The loss is a sum divided by the counts of the whole step, so that a step's result does not depend on how it is divided into
micro-batches, devices or processes.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import register_dataclass

from gp_jax.models.lvlm import LVLM
from gp_jax.runtime.clock import COMPILES
from gp_jax.sharding import batch_sharding, replicated, spread
from gp_jax.training import forward
from gp_jax.training.losses import bce, dice, language_sum, mask_metrics
from gp_jax.training.settings import LossConfig
from gp_jax.trees import Array, TrainBatch

WHAT = {"accumulate": "the gradient", "evaluate": "validation", "update": "the optimizer"}  # how announcements call the programs
TRAINABLE = ("glimpse", "predictor")  # parts of the LVLM that are trained; the rest is frozen


@register_dataclass
@dataclass(frozen=True)
class Counts:
    """Counts over a whole step (all its micro-batches): the denominators of its losses."""

    tokens: Array  # () float: answer tokens
    samples: Array  # () float: samples with at least one visual token


@register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes during training; donated from step to step."""

    params: Any  # trainable parameters, float32
    opt: Any  # optimiser state, for these parameters only
    step: Array  # () int: number of updates so far
    bad: Array  # () int: first step whose loss or gradient was not finite, -1: none; after it nothing changes any more
    rng: Array  # (2,) uint32: key data of the run; a step's key is folded from it and `step`


@register_dataclass
@dataclass(frozen=True)
class Gathered:
    """An unfinished step: sums of gradients and metrics over its micro-batches so far."""

    grads: Any
    sums: dict[str, Array]


LARGEST = "largest_"  # metrics with this prefix are the largest of a step's micro-batches, others their sum
METRICS = ("loss", "language", "dice", "bce", "precision", "recall", "f1", "iou", "retention")


def is_trainable(path: tuple, _: object = None) -> bool:
    """nnx filter: whether a parameter is trained."""
    return path[0] in TRAINABLE


def losses(
    model: LVLM, batch: TrainBatch, counts: Counts, key: Array | None, config: LossConfig, remat: bool, attention: str
) -> tuple[Array, tuple[dict[str, Array], Array]]:
    """A micro-batch's share of the loss of its step, the sums of its metrics, and the importance logits (B, M) that decide what is kept."""
    logits, maps = forward.forward_train(
        model, batch, key, remat=remat, implementation=attention, answer_in_denominator=config.answer_in_denominator
    )
    present = batch.vision.token_image >= 0
    has_image, present = jnp.any(present, axis=-1), present & batch.known

    def mean(per_sample: Array) -> Array:
        return jnp.sum(jnp.where(has_image, per_sample, 0)) / counts.samples

    sums: dict[str, Any] = {
        "language": language_sum(logits, batch.tail.targets) / counts.tokens,
        "dice": sum(mean(dice(head, batch.reference, present)) for head in maps),
        "bce": sum(mean(bce(head, batch.reference, present)) for head in maps),
    }
    located = config.dice_weight * sums["dice"] + config.bce_weight * sums["bce"]
    loss = config.language_weight * sums["language"] + config.location_weight * located
    assert model.glimpse_config is not None, "the glimpse is trained"
    keep = jax.nn.sigmoid(maps[-1]) > model.glimpse_config.reduce_threshold
    sums |= {name: mean(value) for name, value in mask_metrics(keep, batch.reference, present).items()}
    return loss, (sums | {"loss": loss}, maps[-1])


class StepPrograms:
    """The programs of a step, compiled once per bucket shape. Frozen parameters are arguments of the programs, never constants in them."""

    def __init__(
        self,
        module: nnx.Module,
        trains: Callable[[tuple, Any], bool],
        losses: Callable[..., tuple[Array, tuple[dict[str, Array], Array]]],
        metrics: Sequence[str],
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        *,
        seed: int = 0,
        mesh: Mesh | None = None,
        dropout: bool = False,
    ):
        """Args: trains: nnx filter of the trained parameters, which stay where the module has them on the mesh, with their gradients and
        moments; losses: (module, batch, counts, key) -> loss, (metric sums, one array per sample); dropout: whether `losses` takes a
        key."""
        self.mesh, self.optimizer, self.schedule, self.metrics, self.seed = mesh, optimizer, schedule, tuple(metrics), seed
        graph, *states = nnx.split(module, trains, ...)
        self.params, self.frozen = states
        self.graph = graph
        self.places = self._places()

        def forward(params, frozen, batch, counts, key):
            return losses(nnx.merge(graph, params, frozen), batch, counts, key)

        def accumulate(gathered: Gathered, params, frozen, batch: Any, counts: Counts, step: Array, rng: Array) -> Gathered:
            key = jax.random.fold_in(jax.random.wrap_key_data(rng), step) if dropout else None
            grads, (sums, _) = jax.grad(forward, has_aux=True)(params, frozen, batch, counts, key)
            joined = {n: (jnp.maximum if n.startswith(LARGEST) else jnp.add)(gathered.sums[n], sums[n]) for n in self.metrics}
            return Gathered(jax.tree.map(jnp.add, gathered.grads, grads), joined)

        def evaluate(params, frozen, batch: Any, counts: Counts) -> tuple[dict[str, Array], Array]:
            sums, logits = forward(params, frozen, batch, counts, None)[1]
            return sums, jax.lax.with_sharding_constraint(logits, batch_sharding(mesh, logits.shape[0]))

        self.programs = {
            "accumulate": jax.jit(accumulate, donate_argnums=0, out_shardings=self.places[1]),
            "evaluate": jax.jit(evaluate),
            "update": jax.jit(self._update, donate_argnums=(0, 1), out_shardings=(*self.places, replicated(mesh))),
        }
        add, validate, self.update = (self._on_mesh(name, program) for name, program in self.programs.items())
        self.accumulate = lambda gathered, state, *rest: add(gathered, state.params, self.frozen, *rest, state.step, state.rng)
        self.evaluate = lambda state, batch, counts: validate(state.params, self.frozen, batch, counts)

    def _places(self) -> tuple[TrainState, Gathered]:
        """The sharding of every array of a state and of an unfinished step."""
        whole = replicated(self.mesh)

        def own(value: Any) -> jax.sharding.Sharding:
            found = getattr(value, "sharding", None)
            return found if isinstance(found, NamedSharding) and found.mesh == self.mesh else whole

        params = jax.tree.map(own, self.params)
        by_path = dict(jax.tree_util.tree_leaves_with_path(params))

        def beside(path: tuple, leaf: Any) -> jax.sharding.Sharding:
            """A moment's path ends with that of its parameter."""
            return next((by_path[path[start:]] for start in range(len(path)) if path[start:] in by_path), whole)

        opt = jax.tree_util.tree_map_with_path(beside, jax.eval_shape(self.optimizer.init, self.params))
        return TrainState(params, opt, whole, whole, whole), Gathered(params, dict.fromkeys(self.metrics, whole))

    def _on_mesh(self, name: str, program: Callable) -> Callable:
        def run(*args):
            def what() -> str:
                """Gradients and validation depend on the shape of a batch, which is the only argument with a `prompt`."""
                prompts = [arg.prompt for arg in args if hasattr(arg, "prompt")]
                ids = [getattr(prompt, "prompt", prompt).ids for prompt in prompts]  # a prompt under masks holds one
                return WHAT[name] + "".join(f" for {own.shape[0]} x {own.shape[1]:,} rows" for own in ids)

            with COMPILES.naming(what), jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
                return program(*args)

        return run

    def _update(self, state: TrainState, gathered: Gathered) -> tuple[TrainState, Gathered, dict[str, Array]]:
        """One optimiser step; a step that is not finite changes nothing, nor does any step after it."""
        updates, opt = self.optimizer.update(gathered.grads, state.opt, state.params)
        grad_norm = optax.global_norm(gathered.grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(gathered.sums["loss"])
        good = finite & (state.bad < 0)

        def choose(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

        metrics = gathered.sums | {
            "grad_norm": grad_norm,
            "update_norm": optax.global_norm(updates),
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
            "bad": state.bad,
        }
        bad = jnp.where((state.bad < 0) & ~finite, state.step, state.bad)
        after = TrainState(
            params=choose(optax.apply_updates(state.params, updates), state.params),
            opt=choose(opt, state.opt),
            step=state.step + good.astype(jnp.int32),
            bad=bad,
            rng=state.rng,
        )
        return after, jax.tree.map(jnp.zeros_like, gathered), metrics | {"bad": bad}

    def start(self) -> tuple[TrainState, Gathered]:
        """The state before the first step, on the devices."""
        state, gathered = self.places

        def copied(value: Any, place: jax.sharding.Sharding) -> jax.Array:
            """The state is donated, the module's arrays are not."""
            return jnp.copy(value) if getattr(value, "sharding", None) == place else spread(value, place)

        params = jax.tree.map(copied, self.params, state.params)
        opt = jax.jit(self.optimizer.init, out_shardings=state.opt)(params)
        rng = np.asarray(jax.random.key_data(jax.random.key(self.seed)))
        numbers = np.int32(0), np.int32(-1), rng, dict.fromkeys(self.metrics, np.float32(0))
        step, bad, rng, sums = spread(numbers, replicated(self.mesh))
        grads = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=gathered.grads)(params)
        return TrainState(params, opt, step, bad, rng), Gathered(grads, sums)

    def model(self, params: Any) -> Any:
        """The whole module with these trained parameters, for export."""
        return nnx.merge(self.graph, params, self.frozen)


class TrainingStep(StepPrograms):
    """The step that trains the glimpse rows and the predictor; the base model is frozen."""

    def __init__(
        self,
        model: LVLM,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        config: LossConfig,
        *,
        seed: int = 0,
        mesh: Mesh | None = None,
        remat: bool = True,
        attention: str = "auto",
    ):
        glimpse_losses = partial(losses, config=config, remat=remat, attention=attention)
        glimpse = model.glimpse_config
        assert glimpse is not None, "the glimpse is trained"
        dropout = glimpse.le_dropout_prob > 0 and glimpse.rows > 0
        super().__init__(model, is_trainable, glimpse_losses, METRICS, optimizer, schedule, seed=seed, mesh=mesh, dropout=dropout)
