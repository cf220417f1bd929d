"""Rows of any age in one state equal the same requests alone; log-probabilities equal a teacher-forced pass; prompts are shared."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EOS, GLIMPSE, LADDERS, VISION_START, glimpse_weights, hf_model, inputs, save_glimpse, torch_inputs

from gp_jax import GlimpseError, GlimpseVLM, Prune, make_mesh
from gp_jax.inference.decoding import Rows
from gp_jax.inference.requests import sampling_settings
from gp_jax.processing.layout import ARRAYS, read_samples
from gp_jax.runtime.clock import COMPILES

SHAPES = [[5, (4, 6), 7], [3, (2, 2), 9], [12], [2, (6, 4), 3, (2, 4), 5]]
PLANS = [Prune(fixed_remain_ratio=0.4), None, Prune(reduce_threshold=0.5), Prune(max_remain_ratio=0.2)]
SLOTS, PLACES = 16, 3


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoding")
    model = hf_model()
    model.save_pretrained(folder / "base")
    save_glimpse(folder / "glimpse", model, GLIMPSE, glimpse_weights(GLIMPSE))
    return GlimpseVLM.from_pretrained(folder / "base", folder / "glimpse", ladders=LADDERS)


def prefix(vlm, number: int):
    """One request of its own kind, read."""
    prune = PLANS[number]
    raw = inputs([SHAPES[number]], seed=number)
    return vlm.prefill(**raw, prune=prune), raw, prune


@pytest.fixture(scope="module")
def requests(vlm):
    """Per kind the prefix, and what `generate` makes of it alone."""
    found = []
    for number in range(len(SHAPES)):
        own, raw, prune = prefix(vlm, number)
        alone = {t: vlm.generate(**raw, prune=prune, max_new_tokens=SLOTS, temperature=t, seed=number).tokens[0] for t in (0.0, 0.9)}
        found.append((own, alone))
    return found


def lengths(requests) -> list[int]:
    return [max(own.kv[layer].valid.shape[1] for own, _ in requests) for layer in range(len(requests[0][0].kv))]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, SLOTS), st.booleans(), st.integers(0, 5)), min_size=1, max_size=8))
def test_rows_of_any_age_equal_themselves_alone(vlm, requests, arrivals):
    """Requests arrive at any time, at any free place, with any length and temperature; some are given up halfway."""
    rows = Rows.empty(vlm.engine, PLACES, lengths(requests), SLOTS, eos=vlm.config.eos_token_ids)
    waiting, running, step = list(enumerate(arrivals)), {}, 0
    while waiting or running:
        for place in range(PLACES):
            if place not in running and waiting:
                _, (kind, most, drawn, pause) = waiting.pop(0)
                choice = sampling_settings(vlm.config, 0.9 if drawn else 0.0, 0, 1.0, kind, "auto")
                rows.insert(requests[kind][0], place, choice, most)
                running[place] = kind, most, drawn, pause
                if pause > 3:  # the next one comes later
                    break
        rows.generate(1 + step % 2)
        step += 1
        tokens, count, done = rows.read("tokens", "step", "done")
        for place, (kind, most, drawn, pause) in list(running.items()):
            expected = requests[kind][1][0.9 if drawn else 0.0][:most]
            np.testing.assert_array_equal(tokens[place, : count[place]], expected[: count[place]])
            if done[place]:
                ended = (expected == EOS).argmax() + 1 if (expected == EOS).any() else most
                assert count[place] == ended
            if done[place] or pause == 2:
                rows.free(place)
                del running[place]


def test_inserting_and_freeing_compiles_nothing(vlm, requests):
    rows = Rows.empty(vlm.engine, PLACES, lengths(requests), SLOTS)
    choice = sampling_settings(vlm.config, 0.0, 0, 1.0, 0, None)
    for number in range(4):
        rows.insert(requests[number][0], number % PLACES, choice, 5)
    rows.generate()
    rows.free(0)
    before = COMPILES.count
    for number in range(40):
        rows.insert(requests[number % 4][0], number % PLACES, choice, 1 + number % SLOTS)
        rows.generate(2)
        rows.free((number + 1) % PLACES)
    assert COMPILES.count == before
    for most in (0, 17):
        with pytest.raises(GlimpseError, match=rf"max_new_tokens={most} is not in 1\.\.16"):
            rows.insert(requests[0][0], 0, choice, most)
    with pytest.raises(GlimpseError, match="sample=4 is not one of the 4 prompts"):
        rows.insert(requests[0][0], 0, choice, 1, sample=4)
    with pytest.raises(GlimpseError, match="settings are of 2 rows, a place has 1"):
        rows.insert(requests[0][0], 0, sampling_settings(vlm.config, 0.0, 0, 1.0, 0, None, 2), 1)
    with pytest.raises(GlimpseError, match="prompt=7 is not one of the 3 places"):
        rows.free(7)
    with pytest.raises(GlimpseError, match=r"max_new_tokens=40 is not in 1\.\.16"):
        Rows.behind(vlm.engine, requests[0][0], sampling_settings(vlm.config, 0.0, 0, 1.0, 0, None, 4), 40, slots=16)
    with pytest.raises(GlimpseError, match="settings of 3 rows"):
        Rows.behind(vlm.engine, requests[0][0], sampling_settings(vlm.config, 0.0, 0, 1.0, 0, None, 3), 4)
    with pytest.raises(GlimpseError, match="prompt=3 is not one of the 3 places"):
        rows.insert(requests[0][0], 3, choice, 1)
    with pytest.raises(GlimpseError, match="does not fit a place of 8"):
        Rows.empty(vlm.engine, 1, [8] * 3, SLOTS).insert(requests[0][0], 0, choice, 1)


def test_rows_go_on_in_other_places(vlm, requests):
    """Running rows move, a free place appears between them, and a new prompt takes it."""
    rows, choice = Rows.empty(vlm.engine, PLACES, lengths(requests), SLOTS), sampling_settings(vlm.config, 0.0, 0, 1.0, 0, "auto")
    for place, kind in enumerate((0, 3, 1)):
        rows.insert(requests[kind][0], place, choice, SLOTS)
    rows.generate(3)
    with pytest.raises(GlimpseError, match="prompt=3 is not one of the 3 places"):
        rows.resize([0, 3, 1])
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), (rows.kv, rows.state))
    rows.resize([2, -1, 0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (rows.kv, rows.state)) == kinds
    assert rows.read("done")[0][1] and rows.settings.seed.size == rows.prompts == PLACES
    rows.insert(requests[2][0], 1, choice, SLOTS)
    rows.generate(SLOTS)
    tokens, step = rows.read("tokens", "step")
    for place, kind in enumerate((1, 2, 0)):
        expected = requests[kind][1][0.0]
        np.testing.assert_array_equal(tokens[place, : step[place]], expected[: step[place]])
        assert step[place] == len(expected)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_equal_a_teacher_forced_pass(vlm, temperature):
    """Several continuations of each of two prompts, which they share, against transformers on prompt and answer at once."""
    raw, copies, most = inputs([[5, (4, 6), 7], [4, (2, 4), 6]], seed=3), 3, 6
    samples = read_samples(vlm.config, *(raw.get(name) for name in ARRAYS))
    own = vlm.prefill(**raw, prune=None)
    count = own.logits.shape[0] * copies
    for seed in range(20):
        choice = sampling_settings(vlm.config, temperature, 5, 0.9, seed, None, count)
        rows = Rows.behind(vlm.engine, own, choice, most, np.arange(count) < len(samples) * copies, logprobs=True)
        assert all(a.key is b.key for a, b in zip(rows.kv, own.kv, strict=True)), "the caches are shared"
        rows.generate(most)
        tokens, (drawn, full) = (jax.tree.map(lambda x: x[: len(samples) * copies, :most], x) for x in rows.read("tokens", "logprobs"))
        if tokens.max() < VISION_START:  # an answer that transformers takes as text
            break
    assert not temperature or len({tuple(row) for row in tokens}) > len(samples), "continuations differ"
    ends, model = np.cumsum([sample.pixels.shape[0] for sample in samples]), hf_model()
    for row, answer in enumerate(tokens):
        sample = samples[row // copies]
        ids = np.concatenate([sample.ids, answer])[None].astype(np.int64)
        alone = {"input_ids": ids, "attention_mask": np.ones_like(ids), "image_grid_thw": raw["image_grid_thw"][row // copies][None]}
        alone["pixel_values"] = raw["pixel_values"][ends[row // copies] - sample.pixels.shape[0] : ends[row // copies]]
        with torch.no_grad():
            logits = model(**torch_inputs(alone)).logits[0, -most - 1 : -1].double()
        chosen = torch.tensor(answer).long()[:, None]
        np.testing.assert_allclose(full[row], torch.log_softmax(logits, -1).gather(1, chosen)[:, 0], atol=1e-5)
        if not temperature:
            np.testing.assert_array_equal(drawn[row], 0)
            continue
        for step, values in enumerate(logits / temperature):
            largest = values.sort(descending=True).values[:5]  # top_k, and of those as many as reach top_p
            before = torch.softmax(largest, 0).cumsum(0) - torch.softmax(largest, 0)
            expected = values[answer[step]] - torch.logsumexp(largest[before < 0.9], 0)
            assert drawn[row, step] == pytest.approx(float(expected), abs=1e-5)


def test_rows_on_a_mesh_compile_nothing_and_give_the_same_tokens(vlm, requests, tmp_path):
    """Rows split over devices, tokens that end a row not: there may be any number of them."""
    vlm.save_pretrained(tmp_path / "model")
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    split = GlimpseVLM.from_pretrained(tmp_path / "model", ladders=LADDERS, mesh=mesh)
    own = [prefix(split, number)[0] for number in range(4)]
    rows = Rows.empty(split.engine, 4, lengths(requests), SLOTS, eos=(EOS,))
    choice = sampling_settings(split.config, 0.0, 0, 1.0, 0, "auto")
    for turn in range(3):
        before = COMPILES.count
        for place in range(4):
            rows.insert(own[(place + turn) % 4], place, choice, SLOTS)
            rows.generate(1 + place)
        rows.generate(SLOTS)
        tokens, step = rows.read("tokens", "step")
        for place in range(4):
            expected = requests[(place + turn) % 4][1][0.0][: step[place]]
            np.testing.assert_array_equal(tokens[place, : step[place]], expected)
            rows.free(place)
        assert turn == 0 or COMPILES.count == before
