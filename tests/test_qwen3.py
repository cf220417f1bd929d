"""Qwen3-VL against transformers in torch: rope, position table, tower, DeepStack, decoder, logits, greedy tokens, files, pictures."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
import tiny_qwen3 as tiny3
import torch
from safetensors.numpy import load_file, save_file
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from gp_jax import GlimpseError, GlimpseVLM
from gp_jax.models.deepstack import resampled
from gp_jax.ops.rope import rotate
from gp_jax.processing.layout import read_samples, vision_input

TOLERANCE = dict(atol=1e-4, rtol=0)


def inputs(samples, **options) -> dict:
    return tiny.inputs(samples, patch=tiny3.PATCH, **options)


@pytest.fixture(scope="module", params=[tiny3.DEEP, tiny3.TIED], ids=["deep", "tied"])
def pair(request, tmp_path_factory):
    """The same weights in torch and here."""
    model = tiny3.hf_model(**request.param)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, GlimpseVLM.from_pretrained(folder, ladders=tiny.LADDERS)


@torch.no_grad()
def test_norms_and_interleaved_rope(pair):
    """Positions that differ on every axis: with equal ones all kinds of M-RoPE agree."""
    model, vlm = pair
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 11, 32)).astype(np.float32), rng.integers(0, 3000, (3, 2, 11))
    theirs, ours = model.model.language_model.layers[1].self_attn, vlm.model.decoder.layers[1].self_attn
    rope, shape = model.model.language_model.rotary_emb(torch.tensor(x), torch.tensor(positions)), (2, 11, -1, theirs.head_dim)
    q, k = (
        norm(project(torch.tensor(x)).view(shape)).transpose(1, 2)
        for norm, project in ((theirs.q_norm, theirs.q_proj), (theirs.k_norm, theirs.k_proj))
    )
    wanted = apply_rotary_pos_emb(q, k, *rope)
    for own, other in zip(ours.project(jnp.array(x), vlm.model.decoder.angles(jnp.array(positions)))[:2], wanted, strict=True):
        np.testing.assert_allclose(own, other, **TOLERANCE)
    tokens = rng.normal(size=(1, 2, 11, ours.head_dim)).astype(np.float32)
    turned = rotate(jnp.array(tokens), vlm.model.decoder.angles(jnp.array(positions[:, :1])))
    np.testing.assert_allclose(
        turned, apply_rotary_pos_emb(torch.tensor(tokens), torch.tensor(tokens), *(r[:1] for r in rope))[0], **TOLERANCE
    )


@pytest.mark.parametrize("side", [1, 3, 7], ids=str)
def test_position_table_equals_torch_interpolation(side):
    """Pictures below and above the table, one of a single row of patches, and padding between them."""
    rng, sizes = np.random.default_rng(0), [(4, 6), (1, 9), (2, 2), (14, 7)]
    table = rng.normal(size=(side * side, 5)).astype(np.float32)
    hw = np.concatenate([np.indices(size).reshape(2, -1).T for size in sizes])
    whole = np.repeat(np.array(sizes), [a * b for a, b in sizes], axis=0)
    gaps = np.array([0, 24, 30])
    hw, whole, there = np.insert(hw, gaps, 5, axis=0), np.insert(whole, gaps, 1, axis=0), np.insert(np.ones(len(hw), bool), gaps, False)
    ours = np.asarray(resampled(jnp.array(table), jnp.array(hw)[None], jnp.array(whole)[None]))[0][there]
    square = torch.tensor(table).reshape(side, side, 5).permute(2, 0, 1)[None]
    theirs = [torch.nn.functional.interpolate(square, size, mode="bilinear", align_corners=True)[0].flatten(1).T for size in sizes]
    np.testing.assert_allclose(ours, np.concatenate(theirs), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("grids", [[(4, 6)], [(3, 5), (2, 7)], [(1, 9), (1, 1), (8, 5)]], ids=str)
def test_tower_deepstack_and_mergers(pair, grids):
    model, vlm = pair
    batch = inputs([[1, *grids, 1]])
    tower, outputs = model.model.visual, {}
    hooks = [block.register_forward_hook(lambda _, __, out, i=i: outputs.__setitem__(i, out)) for i, block in enumerate(tower.blocks)]
    theirs = tower(torch.tensor(batch["pixel_values"]), grid_thw=torch.tensor(batch["image_grid_thw"]), return_dict=True)
    for hook in hooks:
        hook.remove()
    sample = read_samples(vlm.config, **batch)[0]
    features = vlm.model.vision(vision_input([sample], vlm.config, 1, sample.slots.size + 3), (3, 0, 2))
    np.testing.assert_allclose(features.tokens[0][sample.slot_of_token], theirs.pooler_output, **TOLERANCE)
    assert len(features.deepstack) == len(theirs.deepstack_features) == len(vlm.config.vision.deepstack_visual_indexes)
    for ours, other in zip(features.deepstack, theirs.deepstack_features, strict=True):
        np.testing.assert_allclose(ours[0][sample.slot_of_token], other, **TOLERANCE)
    for ours, block in zip(features.conditions, (3, 0, 2), strict=True):
        np.testing.assert_allclose(ours[0][sample.slot_of_token], outputs[block].unflatten(0, (-1, 4)).mean(1), **TOLERANCE)


BATCHES = {
    "one image": [[5, (4, 6), 7]],
    "wide image": [[3, (2, 19), 4]],
    "text only": [[17]],
    "batch": [[5, (4, 6), 7], [2, (3, 3), 1, (2, 5), 9], [12], [2, (1, 1), 3]],
}


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_logits_positions_and_greedy_tokens(pair, name):
    model, vlm = pair
    theirs = tiny.torch_inputs(inputs(BATCHES[name]))  # transformers generates from left-padded prompts only
    logits = model(**theirs).logits[:, -1]
    model.model.rope_deltas = None
    options = dict(max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=tiny.PAD)
    tokens = model.generate(**theirs, **options)[:, theirs["input_ids"].shape[1] :]
    model.model.rope_deltas = None
    for left in (True, False) if len(BATCHES[name]) > 1 else (True,):
        done = vlm.generate(**inputs(BATCHES[name], left=left), prune=None, max_new_tokens=16, eos_token_id=None)
        np.testing.assert_allclose(done.first_logits, logits, **TOLERANCE)
        np.testing.assert_array_equal(done.tokens, tokens)
    if name != "text only":
        grids, mask = theirs["image_grid_thw"], theirs["attention_mask"]
        positions, _ = model.model.get_rope_index(theirs["input_ids"], theirs["mm_token_type_ids"], grids, attention_mask=mask)
        for b, sample in enumerate(read_samples(vlm.config, **inputs(BATCHES[name]))):
            np.testing.assert_array_equal(sample.positions, positions[:, b, mask[b].bool()])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny3.hf_model(**tiny3.DEEP).save_pretrained(folder)
    return folder, GlimpseVLM.from_pretrained(folder)


def same_weights(one: GlimpseVLM, other: GlimpseVLM) -> None:
    from gp_jax.pretrained.params import export_base

    first, second = (export_base(vlm.model, nested=True) for vlm in (one, other))
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def copied(folder, target):
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return load_file(folder / "model.safetensors")


@pytest.mark.quick
def test_layouts_of_names_and_configs(saved, tmp_path):
    """Nested and flat names, shards, the spelling of transformers 4.57, and what this package writes."""
    folder, vlm = saved
    tensors = copied(folder, tmp_path / "flat")
    flat = {
        key.removeprefix("model.") if ".visual." in key else key.replace("language_model.", ""): value for key, value in tensors.items()
    }
    save_file(flat, tmp_path / "flat" / "model.safetensors")
    tiny3.old_spelling(tmp_path / "flat")
    copied(folder, tmp_path / "shards")
    names = sorted(tensors)
    halves = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / "shards" / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    vlm.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(tensors)
    for name in ("flat", "shards", "ours"):
        other = GlimpseVLM.from_pretrained(tmp_path / name)
        assert other.config == vlm.config, name
        same_weights(vlm, other)
    half = GlimpseVLM.from_pretrained(folder, dtype="bfloat16").model
    assert half.vision.pos_embed.dtype == half.decoder.layers[0].self_attn.q_norm.weight.dtype == jnp.bfloat16


REFUSED = {
    "mixture-of-experts models of Qwen3-VL are not supported": lambda c: c.update(model_type="qwen3_vl_moe"),
    "field 'head_dim' is missing": lambda c: c["text_config"].pop("head_dim"),
    "field 'num_key_value_heads' is missing": lambda c: c["text_config"].pop("num_key_value_heads"),
    "field 'rope_theta' is missing": lambda c: c["text_config"]["rope_parameters"].pop("rope_theta"),
    "mrope_section=.* must be 3 numbers that add up to half the head width": lambda c: c["text_config"]["rope_parameters"].pop(
        "mrope_section"
    ),
    "mrope_interleaved=false is not supported": lambda c: c["text_config"]["rope_parameters"].update(mrope_interleaved=False),
    "attention_bias=true is not supported": lambda c: c["text_config"].update(attention_bias=True),
    "field 'deepstack_visual_indexes' is missing": lambda c: c["vision_config"].pop("deepstack_visual_indexes"),
    r"deepstack_visual_indexes=\[0, 4\] must be distinct blocks in 0..3": lambda c: c["vision_config"].update(
        deepstack_visual_indexes=[0, 4]
    ),
    "num_position_embeddings=35 is not the square": lambda c: c["vision_config"].update(num_position_embeddings=35),
    "out_hidden_size=48 differs from hidden_size=32": lambda c: c["vision_config"].update(out_hidden_size=48),
}


@pytest.mark.quick
@pytest.mark.parametrize("match", REFUSED)
def test_configs_that_are_refused(saved, tmp_path, match):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    REFUSED[match](config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GlimpseError, match=f"config.json.*{match}"):
        GlimpseVLM.from_pretrained(tmp_path)


@pytest.mark.quick
def test_what_does_not_fit_is_named(saved, tmp_path):
    folder, vlm = saved
    with pytest.raises(GlimpseError, match="only still images are supported"):
        vlm.generate(input_ids=np.array([[1, 2]]), pixel_values_videos=np.zeros((4, 1536)))
    with pytest.raises(GlimpseError, match="holds video tokens"):
        vlm.generate(input_ids=np.array([[1, tiny.VIDEO]]))
    tensors = copied(folder, tmp_path / "model")
    tensors.pop("model.visual.deepstack_merger_list.2.norm.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(GlimpseError, match="1 missing: visual.deepstack_merger_list.2.norm.weight"):
        GlimpseVLM.from_pretrained(tmp_path / "model")
    glimpse = tiny3.save_glimpse(tmp_path / "glimpse")
    (glimpse / "config.json").write_text(json.dumps(tiny3.GLIMPSE | {"attn_fuse_global": False}))
    with pytest.raises(GlimpseError, match="attn_fuse_global=False must be true: the model's vision tower has no windows"):
        GlimpseVLM.from_pretrained(folder, glimpse=glimpse)


RELEASED = {  # a released preprocessor_config.json; the sizes are areas, whatever their names say
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
GRIDS = {(640, 480): (30, 40), (100, 60): (14, 22), (5000, 4000): (228, 286), (32, 32): (16, 16)}  # of transformers 5.24, in patches


@pytest.mark.quick
def test_pictures_and_prompts(saved, tmp_path):
    """Grids of transformers' own processor, its pixels, and a token per 32 x 32 pixels in the prompt."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from gp_jax.processing.table import load_processor
    from gp_jax.tiny import QWEN3, make_checkpoint

    vlm = make_checkpoint(tmp_path, hf_config=QWEN3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED))
    processor = load_processor(tmp_path, vlm.config)
    theirs = Qwen2VLImageProcessorPil(**{name: value for name, value in RELEASED.items() if not name.endswith(("class", "type"))})
    for (width, height), grid in GRIDS.items():
        assert tuple(2 * side for side in processor.plot(width, height).grids[0]) == grid
    assert processor.limited(2048).plot(5000, 4000).tokens.size <= 2048
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for h, w in ((60, 100), (300, 40))]
    prepared = processor([pictures], ["What is new?"])
    wanted = [theirs(images=[picture], return_tensors="np") for picture in pictures]
    np.testing.assert_array_equal(prepared.inputs["pixel_values"], np.concatenate([part["pixel_values"] for part in wanted]))
    np.testing.assert_array_equal(prepared.inputs["image_grid_thw"], np.concatenate([part["image_grid_thw"] for part in wanted]))
    assert np.abs(prepared.inputs["pixel_values"]).max() <= 1
    tokens = prepared.inputs["input_ids"] == vlm.config.image_token_id
    assert tokens.sum() == sum(int(part["image_grid_thw"].prod()) for part in wanted) // 4
