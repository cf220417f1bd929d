"""The golden groups of GlimpsePrune+ as the stage takes them."""

from pathlib import Path

import numpy as np

from gp_jax import GlimpseVLM, Prune
from gp_jax.inference.logprobs import masked_prompt
from gp_jax.inference.requests import resolve
from gp_jax.processing.layout import read_samples
from gp_jax.training.plus.advantages import advantages, token_weights
from gp_jax.training.plus.losses import PlusBatch
from gp_jax.training.plus.settings import PolicyConfig
from gp_jax.training.step import Counts
from gp_jax.trees import Completions

FOLDER = "qwen2_5_vl_gp_plus"
GROUP = 4
PRESET = dict(loss="grpo", beta=0.04, group_size=GROUP, flat_groups="keep", cut_completions="keep", importance_cap=0.0, max_new_tokens=12)


def load(shared: Path) -> tuple[GlimpseVLM, dict[str, np.ndarray]]:
    """The golden model with its adapter, and the released numbers."""
    vlm = GlimpseVLM.from_pretrained(shared / "goldens" / "qwen2_5_vl_gp", adapter=shared / "goldens" / FOLDER)
    with np.load(shared / "goldens" / FOLDER / "golden.npz") as file:
        return vlm, dict(file)


def inputs(golden: dict, name: str) -> dict[str, np.ndarray]:
    """A golden prompt as a processor returns it. name: A, B, or A2, B2 for other completions of the same prompts."""
    return {key: golden[f"{name[0]}.{key}"] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}


def prompt(vlm: GlimpseVLM, golden: dict, name: str):
    """A masked prompt, its plan and length."""
    mask, given = golden[f"{name[0]}.ref_mask"], inputs(golden, name)
    samples = read_samples(vlm.config, *given.values())
    batch = vlm.engine.batch(samples, resolve(Prune(reference_masks=[mask]), vlm.glimpse_config, vlm.config.text.num_hidden_layers))
    made, length = masked_prompt(vlm.engine, batch, [mask.reshape(-1)], vlm.engine.view(batch), [0], 1)
    return made, batch.plan, length


def step_batches(vlm: GlimpseVLM, golden: dict, names: list[str], config: PolicyConfig) -> tuple[list[PlusBatch], Counts]:
    """A step of some golden groups, each a micro-batch."""
    found = advantages(
        np.concatenate([golden[f"{name}.rewards"] for name in names]).tolist(),
        np.repeat(range(len(names)), GROUP),
        [False] * GROUP * len(names),
        config,
    )
    valid = np.concatenate([golden[f"{name}.completion_mask"] for name in names]).astype(bool)
    weight, batches = token_weights(valid, found.counted, config), []
    for number, name in enumerate(names):
        made, plan, length = prompt(vlm, golden, name)
        own = slice(GROUP * number, GROUP * (number + 1))
        sampled = golden.get(f"{name}.rollout_logps", np.zeros(valid[own].shape)).astype(np.float32)
        completions = Completions(golden[f"{name}.completion_ids"][None], valid[own][None])
        numbers = np.array([number])
        batches.append(PlusBatch(made, completions, weight[own][None], found.values[own][None], sampled[None], None, numbers, plan, length))
    return batches, Counts(np.float32(valid.sum()), np.float32(len(valid)))
