"""LLaVA-1.5 and LLaVA-NeXT as one program, with the tokens of `generate`."""

import jax
import numpy as np
import pytest
import tiny_llava as tiny

from gp_jax import GlimpseVLM, Ladder, Ladders, Prune, inference_fn, inference_params

NEW = 4


@pytest.fixture(scope="module", params=[False, True], ids=["llava", "llava_next"])
def vlm(request, tmp_path_factory):
    folder = tiny.save_hf(tmp_path_factory.mktemp("model"), tiny.hf_model(request.param))
    return GlimpseVLM.from_pretrained(folder, glimpse=tiny.save_glimpse(folder / "glimpse"), ladders=tiny.LADDERS)


def test_gives_the_tokens_of_generate(vlm):
    """The tower in its smaller rung, its results padded to all slots; a row that only fills the batch."""
    prune, ladders = Prune(fixed_remain_ratio=0.3), {"patches": (16, 96), "prompt": (224,), "kept": (160,), "batch": (2,)}
    if vlm.config.vision.pinpoints:
        ladders["patches"] = (80, 96)
    buckets = Ladders(**{name: Ladder(name, rungs) for name, rungs in ladders.items()})
    infer = jax.jit(inference_fn(vlm.config, prune, buckets, NEW, glimpse=vlm.glimpse_config, eos_token_id=None))
    raw = vlm.processor([[tiny.photo(90, 60)]], ["Who?"]).inputs
    out = infer(inference_params(vlm.model), vlm.inference_inputs(inputs=raw, prune=prune, buckets=buckets))
    done = vlm.generate(**raw, prune=prune, max_new_tokens=NEW, eos_token_id=None)
    np.testing.assert_array_equal(out["tokens"][:1], done.tokens)
    np.testing.assert_array_equal(out["keep"][0, : done.keep[0].size], done.keep[0])
    np.testing.assert_allclose(out["first_logits"][:1], done.first_logits, atol=2e-5)
