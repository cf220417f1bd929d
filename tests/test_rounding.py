"""Where float32 rounds: the same sums whatever XLA does, and importance logits as near to exact arithmetic as the released code's."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny_models as tiny
import torch
from flax import nnx

from gp_jax import GlimpseVLM, Prune
from gp_jax.config.vision import VisionConfig
from gp_jax.models.vision import PatchEmbed

torch.set_num_threads(1)  # tiny operations: threads only wait for each other

CASES = ("single", "multi_image", "wide")
PICTURES = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")


@pytest.mark.parametrize("level", [0, 3])
def test_narrow_towers_add_patches_as_the_released_convolution_does_at_any_optimisation_level(level):
    sizes = dict(depth=1, hidden_size=24, intermediate_size=8, num_heads=2, out_hidden_size=8, fullatt_block_indexes=(0,))
    embed = PatchEmbed(VisionConfig(**sizes), dtype=jnp.float32, rngs=nnx.Rngs(0))
    patches = np.random.default_rng(0).normal(size=(2, 8, 1176)).astype(np.float32)
    program = jax.jit(embed.__call__).lower(patches).compile(compiler_options={"xla_backend_optimization_level": level})
    x, w = (np.float64(a).reshape(*a.shape[:-1], 3, 28, 14) for a in (patches, embed.weight[...]))
    total = np.zeros((2, 8, 24), np.float32)
    for row in range(28):
        for column in range(14):
            for channel in range(3):  # float64 holds the product exactly: one rounding a step
                total = np.float32(total + x[:, :, channel, row, column, None] * w[:, channel, row, column])
    np.testing.assert_array_equal(program(patches), total)
    assert program(patches).dtype == np.float32 and jnp.arange(3).dtype == np.int32, "64 bits stay inside"
    d_patches = jax.grad(lambda p: embed(p).sum())(patches)
    assert d_patches.dtype == np.float32
    np.testing.assert_allclose(d_patches[1, 5], np.asarray(embed.weight[...]).sum(axis=0), atol=1e-5)


def assert_as_near(ours: list[np.ndarray], theirs: list[np.ndarray], exact: list[np.ndarray]) -> None:
    """Over all cases the root mean square of our errors is at most theirs, up to the luck of single roundings."""
    errors = [np.concatenate([np.float64(a) - b for a, b in zip(found, exact, strict=True)]) for found in (ours, theirs)]
    ours, theirs = (float(np.sqrt(np.mean(e**2))) for e in errors)
    assert 0 < ours <= 1.5 * theirs < 1e-4, (ours, theirs)


def test_importance_logits_of_windows_are_as_near_to_exact_as_those_of_torch(tmp_path):
    glimpse, model = tiny.GLIMPSE | dict(attn_fuse_global=False), tiny.hf_model()
    weights = tiny.glimpse_weights(glimpse)
    model.save_pretrained(tmp_path / "base")
    tiny.save_glimpse(tmp_path / "glimpse", model, glimpse, weights)
    vlm = GlimpseVLM.from_pretrained(tmp_path / "base", glimpse=tmp_path / "glimpse", ladders=tiny.LADDERS)
    ours, theirs, exact = [], [], []
    for seed in range(4):
        inputs = tiny.inputs([[3, (3, 5), 2, (2, 7), 6]], seed=seed)
        batch = tiny.torch_inputs(inputs)
        ours.append(vlm.generate(**inputs, prune=Prune(), max_new_tokens=1).mask_logits[0])
        theirs.append(reference.run(model, glimpse, weights, batch, new_tokens=0).mask_logits.numpy())
        exact.append(reference.run_in_float64(model, glimpse, weights, batch, new_tokens=0).mask_logits.numpy())
    assert_as_near(ours, theirs, exact)


@pytest.mark.parametrize("whole", [True, False], ids=["images", "windows"])
def test_importance_logits_are_as_near_to_exact_as_the_released_ones(golden_folder, golden, tmp_path, whole):
    """The released code's numbers for windows were not recorded: torch stands in."""
    model, raw, weights = reference.released_model(golden_folder)
    raw["attn_fuse_global"] = whole
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copy(golden_folder / "new_modules_gp.pt", tmp_path)
    vlm = GlimpseVLM.from_pretrained(golden_folder, glimpse=tmp_path)
    ours, theirs, exact = [], [], []
    for case in CASES:
        inputs = {name: golden[f"{case}.{name}"] for name in PICTURES}
        batch = {name: torch.from_numpy(value) for name, value in inputs.items()}
        batch["mm_token_type_ids"] = (batch["input_ids"] == raw["image_token_id"]).int()
        ours.append(vlm.generate(**inputs, prune=Prune(), max_new_tokens=1).mask_logits[0])
        recorded = golden[f"{case}.free.mask_logits"]
        theirs.append(recorded if whole else reference.run(model, raw, weights, batch, new_tokens=0).mask_logits.numpy())
        exact.append(reference.run_in_float64(model, raw, weights, batch, new_tokens=0).mask_logits.numpy())
    assert_as_near(ours, theirs, exact)
