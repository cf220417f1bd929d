"""Training a glimpse of Qwen3-VL: its logits are those of inference, a step moves it, and it comes out under the released names."""

import jax
import numpy as np
import pytest
import tiny_models as tiny
import tiny_qwen3 as tiny3
import torch
import train_tools as tools

from gp_jax import GlimpseVLM, Prune
from gp_jax.data.collate import TrainSample
from gp_jax.processing.layout import read_samples


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny3.hf_model(**tiny3.DEEP).save_pretrained(folder)
    return GlimpseVLM.from_pretrained(folder, glimpse=tiny3.save_glimpse(folder / "glimpse"), ladders=tiny.LADDERS)


def test_a_step_and_what_is_exported(vlm, tmp_path):
    given = tiny.inputs([[5, (4, 6), 7], [2, (3, 3), 1, (2, 5), 9]], patch=tiny3.PATCH)
    answer, rng = np.array([4, 8, tiny.EOS], np.int32), np.random.default_rng(0)
    samples = [TrainSample(prompt, answer, rng.random(prompt.count) < 0.3) for prompt in read_samples(vlm.config, **given)]
    step, counts = tools.make_step(vlm.model), tools.counts(*samples)
    batch = tools.batch(vlm, samples)
    state, gathered = step.start()
    _, logits = step.evaluate(state, batch, counts)
    done = vlm.generate(**given, prune=Prune(), max_new_tokens=1)
    for b, sample in enumerate(samples):
        np.testing.assert_allclose(np.asarray(logits)[b, sample.prompt.slot_of_token], done.mask_logits[b], atol=1e-4, rtol=0)
    gathered = step.accumulate(gathered, state, batch, counts)
    losses = {name: float(value) for name, value in gathered.sums.items()}
    assert all(np.isfinite(value) for value in losses.values()) and min(losses["dice"], losses["language"]) > 0
    grads = [np.asarray(leaf) for leaf in jax.tree.leaves(gathered.grads)]
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in grads), "every parameter of the glimpse learns"
    state, _, _ = step.update(state, gathered)
    vlm.with_model(step.model(state.params)).save_glimpse(tmp_path / "export")
    written = torch.load(tmp_path / "export" / "new_modules_gp.pt", weights_only=True)
    expected = tiny.glimpse_weights(tiny3.GLIMPSE)
    assert written.keys() == expected.keys()
    for name, part in expected.items():
        same = {key: value.shape for key, value in part.items()} if isinstance(part, dict) else part.shape
        assert ({key: value.shape for key, value in written[name].items()} if isinstance(part, dict) else written[name].shape) == same
    again = GlimpseVLM.from_pretrained(vlm.folder, glimpse=tmp_path / "export", ladders=tiny.LADDERS)
    assert again.glimpse_config == vlm.glimpse_config
