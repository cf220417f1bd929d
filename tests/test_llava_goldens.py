"""The released PyTorch code's numbers for LLaVA-1.5, every case and variant, through the real loader."""

import numpy as np
import pytest

from gp_jax import GlimpseVLM, Prune

CASES = ("img_a", "img_b", "batch2")
VARIANTS = {
    "free": {},
    "cap": {"max_remain_ratio": 0.111},
    "min": {"min_remain_num": 4},
    "anchors": {"anchor_positions": ("tl", "tr", "bl", "br")},
    "keepall": {},
}


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "goldens" / "llava_gp"


@pytest.fixture(scope="module")
def golden(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def vlm(folder):
    return GlimpseVLM.from_pretrained(folder)


def case_inputs(golden: dict, case: str) -> dict:
    return {name: golden[f"{case}.{name}"] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.mark.parametrize("case", CASES)
def test_vision(vlm, golden, case):
    from gp_jax.processing.layout import read_samples, vision_input

    samples = read_samples(vlm.config, **case_inputs(golden, case))
    batch = vlm.engine.ladders.batch.fit(len(samples))
    features = vlm.engine.see(vlm.engine.split(vision_input(samples, vlm.config, batch, vlm.engine.vision_slots(samples)), batch))

    def in_order(values):
        return np.stack([np.asarray(values)[b][sample.slot_of_token] for b, sample in enumerate(samples)])

    np.testing.assert_allclose(in_order(features.tokens), golden[f"{case}.image_features"], atol=1e-4, rtol=0)
    for i, condition in enumerate(features.conditions):
        np.testing.assert_allclose(in_order(condition), golden[f"{case}.visual_cond{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_unpruned(vlm, golden, case):
    done = vlm.generate(**case_inputs(golden, case), prune=None, max_new_tokens=12, eos_token_id=None)
    np.testing.assert_allclose(done.first_logits, golden[f"{case}.unpruned.last_logits"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(done.tokens, golden[f"{case}.unpruned.generated"])
    mask = golden[f"{case}.expanded_attention_mask"].astype(bool)
    np.testing.assert_array_equal(done.attention_mask.astype(bool), mask)
    np.testing.assert_array_equal(done.positions[0][mask], golden[f"{case}.expanded_position_ids"][mask])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pruned(vlm, golden, case, variant):
    name = f"{case}.{variant}"
    prune = Prune(reduce_threshold=float(golden[f"{name}.reduce_threshold"]), **VARIANTS[variant])
    done = vlm.generate(**case_inputs(golden, case), prune=prune, max_new_tokens=12, eos_token_id=None)
    np.testing.assert_array_equal(np.stack(done.keep), golden[f"{name}.keep"])
    np.testing.assert_allclose(np.stack(done.mask_logits), golden[f"{case}.mask_logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(done.first_logits, golden[f"{name}.last_logits"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(done.attention_mask, golden[f"{name}.reduced_attention_mask"])
    np.testing.assert_array_equal(done.positions[0], golden[f"{name}.reduced_position_ids"])
    np.testing.assert_array_equal(done.tokens, golden[f"{name}.generated"])


@pytest.mark.parametrize("case", CASES)
def test_reference_mask(vlm, golden, case):
    reference = golden[f"{case}.refmask.ref"]
    done = vlm.generate(**case_inputs(golden, case), prune=Prune(reference_masks=list(reference)), max_new_tokens=1)
    np.testing.assert_array_equal(np.stack(done.keep), reference.reshape(len(reference), -1))
    np.testing.assert_allclose(done.first_logits, golden[f"{case}.refmask.last_logits"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(done.positions[0], golden[f"{case}.refmask.reduced_position_ids"])
