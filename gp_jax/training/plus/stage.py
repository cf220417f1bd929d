"""The stages `plus` and `sft` as the loop of `train.py` takes them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from gp_jax.pretrained.adapters import save_adapter
from gp_jax.pretrained.saving import save_model
from gp_jax.sharding import replicated
from gp_jax.training.build import Progress
from gp_jax.training.export import export
from gp_jax.training.plus.run import PlusRun, build_plus, describe_plus
from gp_jax.training.plus.settings import PlusConfig
from gp_jax.training.plus.step import PlusStep
from gp_jax.training.plus.summary import means
from gp_jax.training.step import TrainState

LAST_GOOD = "last_good"
SHOWN = ("reward", "policy_loss", "kl", "completion_tokens", "retention", "rollout_gap")


def plus_stage(config: PlusConfig, progress: Progress, tell: Callable[[str], None]) -> dict[str, Any]:
    """The fields of a `stages.Stage`. Raises: GlimpseError that names what is wrong."""
    run = build_plus(config, progress)
    taker, plus = PlusStep(run, tell), config.stage == "plus"
    return dict(
        run=run,
        validate=taker.validate if run.validation is not None else None,
        export=partial(export_plus, run),
        begin_with=partial(begin_with, run),
        describe=partial(describe_plus, run),
        losses=("loss", "policy_loss", "kl") if plus else ("loss",),
        shown=SHOWN if plus else ("loss", "entropy", "retention"),
        validation_shown=("reward", "cut", "retention") if plus else ("loss", "retention"),
        summary=means,
        take=taker,
    )


def export_plus(run: PlusRun, state: TrainState, folder: epath.Path) -> str:
    """Writes `folder`/export: the adapter as PEFT has it, or the whole model; and orbax/ with the trained parameters. Returns: a text that
    names it."""
    params = everywhere(state.params, run.mesh)
    model, tensors = run.step.model(params), nnx.to_pure_dict(params)
    if run.config.adapts:
        export(folder, lambda local: save_adapter(model, local, run.config.model), tensors)
        return "the adapter (adapter_model.safetensors as PEFT has it, orbax)"
    export(folder, lambda local: save_model(model, run.vlm.hf_config, local, source=run.vlm.folder, nested=run.vlm.nested_keys), tensors)
    return "the model (Hugging Face layout, orbax)"


def everywhere(params: Any, mesh: Mesh | None) -> Any:
    """Parameters whole on every device: one process writes them."""
    return params if mesh is None else jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(params)


def begin_with(run: PlusRun, state: TrainState, folder: epath.Path) -> str:
    """Exports the last good state of a run that cannot continue. Returns: the option of train.py that starts from it."""
    export_plus(run, state, folder / LAST_GOOD)
    name = "--adapter-from" if run.config.adapts else "--model"
    return f"{name} {folder / LAST_GOOD / 'export'}"
