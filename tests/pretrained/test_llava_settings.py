"""LLaVA-1.5 with glimpse settings that the goldens do not cover, against the written-out torch reference."""

import numpy as np
import pytest
import reference
import tiny_llava as tiny
import torch

from gp_jax import GlimpseVLM, Prune

SETTINGS = {
    "le_length 3 at some layers, layernorm": dict(le_length=3, le_layers=[1, 0], le_norm_type="layernorm"),
    "several taps, logits, late cut, deep supervision": dict(
        use_attention_logits=True, selected_layers=[2, 0], reduce_layer=2, deep_supervision=True, selected_visual_layers=[4, 0, 2]
    ),
    "V2, no glimpse rows": dict(attn_fuse_type="AttnFuserV2", le_layers=[], selected_layers=[0]),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_reference(setting, tmp_path):
    from tiny_models import glimpse_weights

    number = list(SETTINGS).index(setting)
    model = tiny.hf_model(seed=number, num_key_value_heads=4 - 2 * (number % 2))
    tiny.save_hf(tmp_path, model)
    tiny.save_glimpse(tmp_path / "glimpse", tiny.GLIMPSE | SETTINGS[setting])
    glimpse = dict(attn_fuse_type="AttnFuserV1", le_length=1, le_norm_type="rmsnorm") | tiny.GLIMPSE | SETTINGS[setting]
    weights = glimpse_weights(glimpse, text_size=32, heads=4, vision_size=24)
    vlm = GlimpseVLM.from_pretrained(tmp_path, glimpse=tmp_path / "glimpse", ladders=tiny.LADDERS)
    for images in ([tiny.photo(90, 60)], [tiny.photo(50, 130, seed=1), tiny.photo(64, 64, seed=2)]):
        batch = vlm.processor([images], ["What may that be?"]).inputs
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in batch.items()}
        for rule in ({"fixed_remain_ratio": 0.35}, {"max_remain_ratio": 0.2}):
            theirs = reference.run(model, glimpse, weights, tensors, new_tokens=8, **rule)
            ours = vlm.generate(**batch, prune=Prune(**rule), max_new_tokens=8, eos_token_id=None)
            np.testing.assert_allclose(ours.mask_logits[0], theirs.mask_logits, atol=1e-4, rtol=0)
            np.testing.assert_array_equal(ours.keep[0], theirs.keep)
            np.testing.assert_array_equal(ours.positions[:, 0], theirs.positions)
            np.testing.assert_allclose(ours.first_logits[0], theirs.first_logits, atol=1e-4, rtol=0)
            assert ours.tokens[0].tolist() == theirs.tokens
