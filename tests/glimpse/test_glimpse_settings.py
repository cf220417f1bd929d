"""Settings that the released configuration allows and the goldens do not cover, against the written-out torch reference."""

import numpy as np
import pytest
import reference
import tiny_models as tiny
import torch

from gp_jax import GlimpseVLM, Prune

SETTINGS = {
    "base": {},
    "le_length 3 at some layers, layernorm": dict(le_length=3, le_layers=[2, 0], le_norm_type="layernorm"),
    "log-softmax, several taps, late cut": dict(use_attention_logits=False, selected_layers=[2, 0], reduce_layer=2),
    "windowed, deep supervision": dict(attn_fuse_global=False, deep_supervision=True, selected_visual_layers=[0, 3, 2]),
    "V2, windowed, log-softmax": dict(attn_fuse_type="AttnFuserV2", attn_fuse_global=False, use_attention_logits=False),
    "flash layout of values": dict(attn_fuse_use_flash_attn=True, selected_visual_layers=[2]),
    "no glimpse rows": dict(le_layers=[], selected_layers=[0, 1]),
    "cut behind the last layer": dict(reduce_layer=1000, selected_layers=[1, 2]),
}
IMAGES = {"one": [4, (4, 6), 5], "two": [3, (3, 5), 2, (2, 7), 6]}


@pytest.fixture(scope="module", params=SETTINGS, ids=list(SETTINGS))
def models(request, tmp_path_factory):
    glimpse = tiny.GLIMPSE | SETTINGS[request.param]
    number = list(SETTINGS).index(request.param)
    model = tiny.hf_model(seed=number, kv_heads=4 if number % 2 else 2, tied=number % 3 == 1)
    weights = tiny.glimpse_weights(glimpse, seed=number)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder / "base")
    tiny.save_glimpse(folder / "glimpse", model, glimpse, weights)
    return model, glimpse, weights, GlimpseVLM.from_pretrained(folder / "base", glimpse=folder / "glimpse", ladders=tiny.LADDERS)


def median_threshold(model, glimpse, weights, batch) -> float:
    """A threshold in the widest gap near the middle of a sample's importance, so that rounding cannot flip a decision."""
    logits = np.sort(reference.run(model, glimpse, weights, tiny.torch_inputs(batch), new_tokens=0).mask_logits.numpy())
    middle = logits[len(logits) // 4 : 3 * len(logits) // 4 + 2]
    gap = np.argmax(np.diff(middle))
    return float(1 / (1 + np.exp(-(middle[gap] + middle[gap + 1]) / 2)))


@pytest.mark.parametrize("images", IMAGES)
def test_equals_reference(models, images):
    model, glimpse, weights, vlm = models
    batch = tiny.inputs([IMAGES[images]], seed=7)
    threshold = median_threshold(model, glimpse, weights, batch)
    for rule in ({}, {"max_remain_ratio": 0.2}, {"fixed_remain_ratio": 0.35}):
        theirs = reference.run(model, glimpse, weights, tiny.torch_inputs(batch), new_tokens=8, threshold=threshold, **rule)
        ours = vlm.generate(**batch, prune=Prune(reduce_threshold=threshold, **rule), max_new_tokens=8, eos_token_id=None)
        np.testing.assert_allclose(ours.mask_logits[0], theirs.mask_logits, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(ours.keep[0], theirs.keep)
        np.testing.assert_array_equal(ours.positions[:, 0], theirs.positions)
        np.testing.assert_allclose(ours.first_logits[0], theirs.first_logits, atol=1e-4, rtol=0)
        assert ours.tokens[0].tolist() == theirs.tokens
        assert 0 < ours.keep[0].sum() < ours.keep[0].size


def test_batch_equals_reference_one_by_one(models):
    model, glimpse, weights, vlm = models
    samples = [IMAGES["two"], IMAGES["one"], [9]]
    together = vlm.generate(
        **tiny.inputs(samples, seed=7, left=False), prune=Prune(max_remain_ratio=0.3), max_new_tokens=8, eos_token_id=None
    )
    for b, sample in enumerate(samples[:2]):
        whole = tiny.inputs(samples, seed=7, left=False)
        patches = [4 * sum(r * c for r, c in (x for x in s if not isinstance(x, int))) for s in samples]
        images = [sum(not isinstance(x, int) for x in s) for s in samples]
        alone = {
            "input_ids": whole["input_ids"][b : b + 1, : whole["attention_mask"][b].sum()],
            "attention_mask": np.ones((1, whole["attention_mask"][b].sum()), np.int64),
            "pixel_values": whole["pixel_values"][sum(patches[:b]) : sum(patches[: b + 1])],
            "image_grid_thw": whole["image_grid_thw"][sum(images[:b]) : sum(images[: b + 1])],
        }
        theirs = reference.run(model, glimpse, weights, tiny.torch_inputs(alone), new_tokens=8, max_remain_ratio=0.3)
        np.testing.assert_allclose(together.mask_logits[b], theirs.mask_logits, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(together.keep[b], theirs.keep)
        assert together.tokens[b].tolist() == theirs.tokens, sample
    assert together.keep[2].size == 0


@pytest.mark.quick
def test_the_reference_reproduces_the_released_code(golden_folder, golden):
    """The oracle of this file is itself held against the goldens."""
    model, raw, weights = reference.released_model(golden_folder)
    for case in ("single", "multi_image", "wide"):
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        batch = {name: torch.from_numpy(golden[f"{case}.{name}"]) for name in names}
        batch["mm_token_type_ids"] = (batch["input_ids"] == raw["image_token_id"]).int()
        threshold = float(golden[f"{case}.free.reduce_threshold"])
        theirs = reference.run(model, raw, weights, batch, new_tokens=12, threshold=threshold)
        np.testing.assert_allclose(theirs.mask_logits, golden[f"{case}.free.mask_logits"], atol=1e-4, rtol=0)
        np.testing.assert_array_equal(theirs.keep, golden[f"{case}.free.keep"])
        assert theirs.tokens == golden[f"{case}.free.generated"][0].tolist()
