"""Qwen3-VL under pruning: cuts before, between and behind the layers that DeepStack adds to, and what must not change a result."""

import dataclasses

import numpy as np
import pytest
import tiny_models as tiny
import tiny_qwen3 as tiny3

from gp_jax import GlimpseVLM, Ladder, Prune, make_mesh
from gp_jax.inference import requests

SAMPLES = [[5, (4, 6), 7], [2, (3, 3), 1, (2, 5), 9], [12], [1, (2, 2), 3]]
CUTS = range(-1, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny3.hf_model(**tiny3.DEEP).save_pretrained(folder)
    tiny3.save_glimpse(folder / "glimpse")
    return folder


def load(folder, **options):
    return GlimpseVLM.from_pretrained(folder, glimpse=folder / "glimpse", **dict(ladders=tiny.LADDERS) | options)


@pytest.fixture(scope="module")
def vlm(folder):
    return load(folder)


def generate(vlm, samples, prune, **options):
    given = tiny.inputs(samples, patch=tiny3.PATCH, seed=3)
    return vlm.generate(**given, prune=prune, **dict(max_new_tokens=4, eos_token_id=None) | options)


@pytest.mark.parametrize("past", [True, False], ids=["past too", "past kept"])
def test_every_cut_equals_the_written_out_way(vlm, past, monkeypatch):
    """First logits, and tokens behind them. A cut after layer 0 or 1 takes rows out of features that are still to be added."""
    model, make_plan = tiny3.hf_model(**tiny3.DEEP), requests.make_plan
    monkeypatch.setattr(requests, "make_plan", lambda *a: tuple(dataclasses.replace(cut, past=past) for cut in make_plan(*a)))
    for samples in (SAMPLES[:1], SAMPLES[1:2])[: 1 + past]:
        theirs = tiny.torch_inputs(tiny.inputs(samples, patch=tiny3.PATCH, seed=3))
        count = int((theirs["input_ids"] == tiny.IMAGE).sum())
        keep = np.random.default_rng(count).random(count) < 0.3
        answers = []
        for after in CUTS:
            done = generate(vlm, samples, Prune(reference_masks=[keep], after=after))
            logits, answer = [], []
            for _ in range(4):
                logits.append(tiny3.pruned_logits(model, theirs, keep, after, answer, past).numpy())
                answer.append(int(logits[-1].argmax()))
            np.testing.assert_allclose(done.first_logits[0], logits[0], atol=1e-4, rtol=0)
            np.testing.assert_array_equal(done.tokens[0], answer)
            answers.append(logits[0])
        assert min(np.abs(a - b).max() for a, b in zip(answers, answers[1:], strict=False)) > 1e-2, "the depth of the cut matters"


RULES = [
    Prune(max_remain_ratio=0.3),
    Prune(method="random", fixed_remain_ratio=0.4, after=0),
]


def test_a_batch_equals_its_samples_and_any_bucket_any_other(folder, vlm):
    wide = dataclasses.replace(tiny.LADDERS, patches=Ladder("patches", (512, 768)), kept=Ladder("kept", (17, 23, 29, 64)))
    other = load(folder, ladders=dataclasses.replace(wide, prompt=Ladder("prompt", (61, 192)), batch=Ladder("batch", (1, 4))))
    for prune in RULES:
        together = generate(vlm, SAMPLES, prune)
        finer = generate(other, SAMPLES, prune)
        np.testing.assert_array_equal(together.tokens, finer.tokens)
        np.testing.assert_allclose(together.first_logits, finer.first_logits, atol=2e-5, rtol=0)
        first = 0
        whole = tiny.inputs(SAMPLES, patch=tiny3.PATCH, seed=3)
        for b, sample in enumerate(SAMPLES):
            images = sum(isinstance(part, tuple) for part in sample)
            grids = whole["image_grid_thw"][first : first + images]
            start = int(whole["image_grid_thw"][:first].prod(axis=1).sum())
            pixels = whole["pixel_values"][start : start + int(grids.prod(axis=1).sum())]
            first += images
            own = {"input_ids": whole["input_ids"][b : b + 1], "attention_mask": whole["attention_mask"][b : b + 1]}
            own |= {"pixel_values": pixels, "image_grid_thw": grids} if images else {}
            alone = other.generate(**own, prune=prune, max_new_tokens=4, eos_token_id=None)
            np.testing.assert_array_equal(together.tokens[b], alone.tokens[0])
            np.testing.assert_array_equal(together.keep[b], alone.keep[0])
            np.testing.assert_allclose(together.first_logits[b], alone.first_logits[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", ["attention", "pyramiddrop", "visionzip", "divprune", "cdpruner", "vscan"])
def test_scorers_of_other_methods_take_this_tower(vlm, method):
    done = generate(vlm, SAMPLES, Prune(method=method, fixed_remain_ratio=0.5), max_new_tokens=2)
    assert np.isfinite(done.first_logits).all()
    assert [int(keep.sum()) for keep in done.keep] == [12, 9, 0, 2]


def test_eight_devices_equal_one(folder, vlm):
    mesh = make_mesh(2, 2, 2)
    sharded = load(folder, mesh=mesh)
    for prune in RULES:
        one, other = (generate(model, SAMPLES, prune) for model in (vlm, sharded))
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.first_logits, other.first_logits, atol=1e-4, rtol=0)
    weight = sharded.model.vision.blocks[0].mlp.linear_fc1.weight[...]
    assert weight.addressable_shards[0].data.shape == (20, 12), "the tower's MLP is split over tensor and fsdp"
