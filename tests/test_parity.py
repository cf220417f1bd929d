"""Parity ladder against transformers in torch: rope, attention, block, tower, merger, decoder, logits, greedy tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision

from gp_jax import GlimpseVLM
from gp_jax.ops.rope import grid_angles, rotate, text_angles
from gp_jax.processing.layout import read_samples, vision_input

TOLERANCE = dict(atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=[dict(), dict(kv_heads=4, tied=True, seed=3)], ids=["gqa", "mha-tied"])
def pair(request, tmp_path_factory):
    """The same weights in torch and here."""
    model = tiny.hf_model(**request.param)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, GlimpseVLM.from_pretrained(folder, ladders=tiny.LADDERS)


def test_text_rope(pair):
    model, vlm = pair
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 3000, (3, 2, 11))
    x = rng.normal(size=(2, 4, 11, 8)).astype(np.float32)
    rotary = model.model.language_model.rotary_emb
    theirs, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), *rotary(torch.tensor(x), torch.tensor(positions)))
    text = vlm.config.text
    ours = rotate(jnp.array(x), text_angles(jnp.array(positions), text.head_dim, text.rope_theta, text.mrope_section))
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_vision_rope(pair):
    model, vlm = pair
    rng = np.random.default_rng(0)
    hw = rng.integers(0, 90, (13, 2))
    x = rng.normal(size=(13, 2, 12)).astype(np.float32)
    cos, sin = model.model.visual.rotary_pos_emb(torch.tensor(x), torch.tensor(hw))
    theirs, _ = apply_rotary_pos_emb_vision(torch.tensor(x), torch.tensor(x), cos, sin)
    ours = rotate(jnp.array(x).transpose(1, 0, 2)[None], grid_angles(jnp.array(hw), 12)[None])[0].transpose(1, 0, 2)
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@torch.no_grad()
def test_decoder_attention_and_layer(pair):
    model, vlm = pair
    x = np.random.default_rng(0).normal(size=(2, 9, 32)).astype(np.float32)
    positions = np.broadcast_to(np.arange(9), (3, 2, 9))
    theirs = model.model.language_model.layers[0]
    embeddings = model.model.language_model.rotary_emb(torch.tensor(x), torch.tensor(positions.copy()))
    causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    attention = theirs.self_attn(torch.tensor(x), causal, position_embeddings=embeddings)[0]
    block = theirs(torch.tensor(x), attention_mask=causal, position_embeddings=embeddings)
    block = block[0] if isinstance(block, tuple) else block
    ours, angles, valid = vlm.model.decoder.layers[0], vlm.model.decoder.angles(jnp.array(positions)), jnp.ones((2, 9), bool)
    from gp_jax.ops.attention import attend

    q, k, v = ours.self_attn.project(jnp.array(x), angles)
    segment = jnp.zeros((2, 9), int)
    np.testing.assert_allclose(ours.self_attn.output(attend(q, k, v, segment, segment, causal=True)), attention, **TOLERANCE)
    np.testing.assert_allclose(ours.prefill(jnp.array(x), angles, valid)[0], block, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("grids", [[(4, 6)], [(3, 5), (2, 7)], [(1, 9)], [(8, 8), (1, 1), (5, 2)]], ids=str)
def test_vision_blocks_tower_and_merger(pair, grids):
    model, vlm = pair
    batch = tiny.inputs([[1, *grids, 1]])
    from reference import see_windows

    embeds, conditions = see_windows(model, torch.tensor(batch["pixel_values"]), torch.tensor(batch["image_grid_thw"]), [0, 1, 2, 3])
    sample = read_samples(vlm.config, **batch)[0]
    features = vlm.model.vision(vision_input([sample], vlm.config, 1, sample.slots.size), (0, 1, 2, 3))
    np.testing.assert_allclose(features.tokens[0][sample.slot_of_token], embeds, **TOLERANCE)
    for ours, theirs in zip(features.conditions, conditions, strict=True):
        np.testing.assert_allclose(ours[0][sample.slot_of_token], theirs, **TOLERANCE)


BATCHES = {
    "one image": [[5, (4, 6), 7]],
    "small image": [[2, (1, 1), 3]],
    "wide image": [[3, (2, 19), 4]],
    "two images": [[3, (3, 5), 4, (4, 2), 6]],
    "text only": [[17]],
    "batch": [[5, (4, 6), 7], [2, (3, 3), 1, (2, 5), 9], [12]],
}


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_logits_and_greedy_tokens(pair, name, left):
    model, vlm = pair
    if not left and len(BATCHES[name]) == 1:
        left = True  # padding side means nothing for one sample; torch generation needs the left
    theirs = tiny.torch_inputs(tiny.inputs(BATCHES[name]))  # transformers generates from left-padded prompts only
    logits = model(**theirs).logits[:, -1]
    options = dict(max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=tiny.PAD)
    tokens = model.generate(**theirs, **options)[:, theirs["input_ids"].shape[1] :]
    done = vlm.generate(**tiny.inputs(BATCHES[name], left=left), prune=None, max_new_tokens=16, eos_token_id=None)
    np.testing.assert_allclose(done.first_logits, logits, **TOLERANCE)
    np.testing.assert_array_equal(done.tokens, tokens)


def test_positions_equal_get_rope_index(pair):
    model, vlm = pair
    for name, segments in BATCHES.items():
        if name == "text only":
            continue
        batch = tiny.inputs(segments)
        t = tiny.torch_inputs(batch)
        theirs, _ = model.model.get_rope_index(
            t["input_ids"], t["mm_token_type_ids"], t["image_grid_thw"], attention_mask=t["attention_mask"]
        )
        for b, sample in enumerate(read_samples(vlm.config, **batch)):
            np.testing.assert_array_equal(sample.positions, theirs[:, b, batch["attention_mask"][b].astype(bool)])
