"""Log-probabilities under pruning of LLaVA: they equal the sampler's own, also for several prompts together."""

import numpy as np
import pytest
import tiny_llava as tiny

from gp_jax import GlimpseVLM, Prune
from gp_jax.inference.decoding import Rows
from gp_jax.inference.requests import sampling_settings

SIZES = ((90, 60), (50, 130))


@pytest.mark.parametrize("following", [False, True], ids=["llava-1.5", "llava-next"])
def test_they_equal_the_samplers(tmp_path, following):
    folder = tiny.save_hf(tmp_path, tiny.hf_model(following=following))
    vlm = GlimpseVLM.from_pretrained(folder, ladders=tiny.LADDERS)
    inputs = vlm.processor([[tiny.photo(*size)] for size in SIZES], ["Who is it?", "What?"]).inputs
    rng = np.random.default_rng(0)
    masks = [rng.random(sample.count) < 0.4 for sample in vlm._read(inputs)]
    for prune in (Prune(reference_masks=masks, after=0), None):
        prefix = vlm.prefill(**inputs, prune=prune)
        count = 2 * prefix.logits.shape[0]
        rows = Rows.behind(vlm.engine, prefix, sampling_settings(vlm.config, 1.0, 0, 1.0, 5, None, rows=count), 5, logprobs=True)
        rows.generate(4)
        tokens, sampled = rows.read("tokens", "logprobs")
        exact = vlm.logprobs(**inputs, completion_ids=tokens[:4, :5].reshape(2, 2, 5), prune=prune)
        np.testing.assert_allclose(exact.reshape(4, 5), sampled[0][:4, :5], atol=1e-5, rtol=0)
