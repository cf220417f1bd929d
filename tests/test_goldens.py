"""The released PyTorch code's numbers, every case and variant, through the real loader."""

import numpy as np
import pytest

from gp_jax import GlimpseError, Prune

pytestmark = pytest.mark.quick

CASES = ("single", "multi_image", "wide", "batch2")
VARIANTS = {
    "free": {},
    "cap": {"max_remain_ratio": 0.111},
    "min": {"min_remain_num": 4},
    "anchors": {"anchor_positions": ("tl", "tr", "bl", "br")},
}


def case_inputs(golden: dict, case: str) -> dict:
    return {name: golden[f"{case}.{name}"] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}


def pruned(vlm, golden: dict, case: str, variant: str, **more):
    rule = VARIANTS[variant] | {"reduce_threshold": float(golden[f"{case}.{variant}.reduce_threshold"])}
    return vlm.generate(**case_inputs(golden, case), prune=Prune(**rule, **more), max_new_tokens=12, eos_token_id=None)


@pytest.mark.parametrize("case", CASES)
def test_unpruned(golden_vlm, golden, case):
    done = golden_vlm.generate(**case_inputs(golden, case), prune=None, max_new_tokens=12, eos_token_id=None)
    np.testing.assert_allclose(done.first_logits, golden[f"{case}.unpruned.last_logits"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(done.tokens, golden[f"{case}.unpruned.generated"])
    mask, positions = golden[f"{case}.attention_mask"].astype(bool), golden[f"{case}.position_ids"]
    for b in range(len(mask)):
        length = mask[b].sum()
        np.testing.assert_array_equal(done.positions[:, b, -length:], positions[:, b, mask[b]])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pruned(golden_vlm, golden, case, variant):
    name = f"{case}.{variant}"
    if case == "multi_image" and variant == "anchors":
        with pytest.raises(GlimpseError, match="needs samples with one image, this one has 2"):
            golden_vlm.generate(**case_inputs(golden, case), prune=Prune(anchor_positions=("tl",)), max_new_tokens=1)
        return
    if case == "batch2" and variant == "anchors":  # not recorded there: the corners stay, whatever the rest
        prune = Prune(reduce_threshold=float(golden[f"{case}.free.reduce_threshold"]), anchor_positions=("tl", "br"))
        done = golden_vlm.generate(**case_inputs(golden, case), prune=prune, max_new_tokens=1)
        assert all(keep[0] and keep[-1] for keep in done.keep)
        return
    # The released code decodes a pruned batch at its last sample's positions; the golden batch needs that reproduced.
    done = pruned(golden_vlm, golden, case, variant, released_batch_positions=case == "batch2")
    np.testing.assert_array_equal(np.concatenate(done.keep), golden[f"{name}.keep"])
    np.testing.assert_allclose(np.concatenate(done.mask_logits), golden[f"{name}.mask_logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(done.first_logits, golden[f"{name}.last_logits"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(done.positions, golden[f"{name}.reduced_position_ids"])
    np.testing.assert_array_equal(done.attention_mask, golden[f"{name}.reduced_attention_mask"])
    np.testing.assert_array_equal(done.tokens, golden[f"{name}.generated"])


@pytest.mark.parametrize("case", ["single", "wide"])
def test_reference_mask(golden_vlm, golden, case):
    reference = golden[f"{case}.refmask.ref"]
    done = golden_vlm.generate(**case_inputs(golden, case), prune=Prune(reference_masks=[reference]), max_new_tokens=1)
    np.testing.assert_array_equal(done.keep[0], reference.reshape(-1))
    np.testing.assert_allclose(done.first_logits, golden[f"{case}.refmask.last_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_vision(golden_vlm, golden, case):
    from gp_jax.processing.layout import read_samples, vision_input

    engine = golden_vlm.engine
    samples = read_samples(golden_vlm.config, **case_inputs(golden, case))
    batch = engine.ladders.batch.fit(len(samples))
    features = engine.see(engine.split(vision_input(samples, golden_vlm.config, batch, engine.vision_slots(samples)), batch))

    def in_order(values):
        return np.concatenate([np.asarray(values)[b][sample.slot_of_token] for b, sample in enumerate(samples)])

    np.testing.assert_allclose(in_order(features.tokens), golden[f"{case}.image_embeds"], atol=1e-4, rtol=0)
    for i, condition in enumerate(features.conditions):
        np.testing.assert_allclose(in_order(condition), golden[f"{case}.visual_cond{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["free", "cap", "min"])
def test_released_batch_tokens_depend_on_the_neighbour_ours_do_not(golden_vlm, golden, variant):
    """Default positions: each row of the golden batch decodes as it does alone; the last row therefore as released."""
    together = pruned(golden_vlm, golden, "batch2", variant)
    whole, first = case_inputs(golden, "batch2"), 0
    for b, (_, height, width) in enumerate(whole["image_grid_thw"]):
        patches = slice(first, first + height * width)
        first += height * width
        alone = golden_vlm.generate(
            input_ids=whole["input_ids"][b : b + 1],
            attention_mask=whole["attention_mask"][b : b + 1],
            pixel_values=whole["pixel_values"][patches],
            image_grid_thw=whole["image_grid_thw"][b : b + 1],
            prune=Prune(reduce_threshold=float(golden[f"batch2.{variant}.reduce_threshold"]), **VARIANTS[variant]),
            max_new_tokens=12,
            eos_token_id=None,
        )
        np.testing.assert_array_equal(together.tokens[b], alone.tokens[0])
    np.testing.assert_array_equal(together.tokens[-1], golden[f"batch2.{variant}.generated"][-1])
