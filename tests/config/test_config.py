"""config.json in both layouts, and every glimpse setting that cannot work."""

import dataclasses
import json

import pytest
import tiny_models as tiny

from gp_jax import GlimpseError
from gp_jax.config.model import GlimpseConfig
from gp_jax.pretrained.hf_config import flat_hf_config, glimpse_config, model_config

pytestmark = pytest.mark.quick

NESTED = json.loads(json.dumps(tiny.hf_model().config.to_dict(), default=str))
MODEL = model_config(NESTED)
GLIMPSE = glimpse_config(tiny.GLIMPSE, MODEL)


def flat(**changes):
    return flat_hf_config(NESTED, GLIMPSE) | changes


def test_both_layouts_say_the_same():
    assert model_config(flat()) == MODEL
    assert glimpse_config(flat(), MODEL) == GLIMPSE
    assert MODEL.text.mrope_section == (1, 1, 2) and MODEL.text.rope_theta == 1e6 and MODEL.eos_token_ids == (tiny.EOS,)


def test_golden_config(golden_folder):
    raw = json.loads((golden_folder / "config.json").read_text())
    generation = json.loads((golden_folder / "generation_config.json").read_text())
    config = model_config(raw, generation)
    assert (config.text.head_dim, config.vision.window_side, config.vision.patch_dim) == (16, 2, 1176)
    assert (config.eos_token_ids, config.pad_token_id, config.image_token_id) == ((501,), 502, 513)
    glimpse = glimpse_config(raw, config)
    assert glimpse.selected_visual_layers == (7, 5, 3, 1) and glimpse.rows == 1
    assert model_config(flat_hf_config(raw, glimpse), generation) == config


def test_released_sizes():
    """Qwen2.5-VL-7B as on the Hub."""
    hub = {
        "model_type": "qwen2_5_vl",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }
    config = model_config(hub, {"eos_token_id": [151645, 151643], "pad_token_id": 151643})
    assert (config.text.head_dim, config.vision.head_dim, config.vision.window_side) == (128, 80, 4)
    assert config.eos_token_ids == (151645, 151643) and config.pad_token_id == 151643
    released = dict(selected_layers=[18], reduce_layer=18, le_layers=list(range(28)), selected_visual_layers=[31, 23, 15, 7])
    glimpse = glimpse_config(released | dict(attn_fuse_size=256, visual_cond_size=512, deep_supervision=False), config)
    assert glimpse.cond_size == 512


def test_fields_that_the_hub_leaves_out():
    """The 32B model's vision_config names neither its depth nor its heads: transformers' own defaults hold."""
    vision = {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 32, "in_chans": 3, "tokens_per_second": 2}
    config = model_config(flat(vision_config=vision))
    assert (config.vision.depth, config.vision.num_heads, config.vision.fullatt_block_indexes) == (32, 16, (7, 15, 23, 31))


def test_null_ids_in_the_generation_config_hide_nothing():
    config = model_config(flat(eos_token_id=7, pad_token_id=8), {"eos_token_id": None, "pad_token_id": None})
    assert config.eos_token_ids == (7,) and config.pad_token_id == 8


def test_defaults_of_the_released_config_class():
    """Its reduce_layer of 1000 means the last layer; its le_layers of (0,) is fine; ori_attn_supervision changes nothing."""
    glimpse = GlimpseConfig(selected_layers=(1,), reduce_layer=1000, selected_visual_layers=(2,)).validate(MODEL)
    assert glimpse.reduce_layer == MODEL.text.num_hidden_layers - 1


BAD_GLIMPSE = {
    "selected_layers=(2,) must be distinct layers in 0..1": dict(selected_layers=(2,)),
    "selected_layers=(1, 1) must be distinct": dict(selected_layers=(1, 1)),
    "selected_layers=(): must have a length of at least 1": dict(selected_layers=()),
    "reduce_layer=-1: must be at least 0": dict(reduce_layer=-1),
    "le_layers=(1, 2) must contain 0": dict(le_layers=(1, 2)),
    "le_layers=(0, 3) must be distinct layers in 0..2": dict(le_layers=(0, 3)),
    "le_length=0 must be positive": dict(le_length=0),
    "le_norm_type='batchnorm': must be 'rmsnorm' or 'layernorm'": dict(le_norm_type="batchnorm"),
    "le_dropout_prob=1.0: must be less than 1": dict(le_dropout_prob=1.0),
    "attn_fuse_type='AttnFuserDummy': must be 'AttnFuserV1', 'AttnFuserV2' or 'mean'": dict(attn_fuse_type="AttnFuserDummy"),
    "selected_visual_layers=(): must have a length of at least 1": dict(selected_visual_layers=()),
    "selected_visual_layers=(4,) must be distinct blocks in 0..3": dict(selected_visual_layers=(4,)),
    "attn_fuse_num_heads=3 x 4 must divide": dict(attn_fuse_num_heads=3),
    "attn_fuse_size=18 is not divisible by attn_fuse_num_heads=4": dict(attn_fuse_size=18, visual_cond_size=14, attn_fuse_num_heads=4),
    "max_remain_ratio=2: must be at most 1": dict(max_remain_ratio=2),
    "attn_fuse_size=0: must be at least 1": dict(attn_fuse_size=0),
    "reduce_threshold=nan: must be a finite number": dict(reduce_threshold=float("nan")),
    "anchor_positions[0]='xx': must be 'tl', 'tr', 'bl' or 'br'": dict(anchor_positions=("xx",)),
    "use_ref_masks=True excludes use_zero_masks=True": dict(use_ref_masks=True, use_zero_masks=True),
}


@pytest.mark.parametrize("message", BAD_GLIMPSE)
def test_bad_glimpse_settings(message):
    with pytest.raises(GlimpseError) as error:
        dataclasses.replace(GLIMPSE, **BAD_GLIMPSE[message]).validate(MODEL)
    assert message in str(error.value)


BAD_MODEL = {
    "model_type 'llama' is not supported": dict(model_type="llama"),
    "rope_scaling: type 'yarn' is not supported": dict(rope_scaling={"type": "yarn", "mrope_section": [1, 1, 2]}),
    "use_sliding_window=true is not supported": dict(use_sliding_window=True),
    "hidden_size=30 is not divisible by num_attention_heads=4": dict(hidden_size=30),
    "num_key_value_heads=3": dict(num_key_value_heads=3),
    "mrope_section=[1, 1] must be 3 numbers": dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1]}),
    "field 'vision_config' is missing": dict(vision_config=None),
    "out_hidden_size=16 differs from hidden_size=32": dict(vision_config=NESTED["vision_config"] | {"out_hidden_size": 16}),
    "vision_config: field 'hidden_size' is missing": dict(
        vision_config={k: v for k, v in NESTED["vision_config"].items() if k != "hidden_size"}
    ),
    "vision_config='x': must be an object": dict(vision_config="x"),
    "rope_scaling='x': must be an object": dict(rope_scaling="x"),
    "mrope_section='abc': must be a list": dict(rope_scaling={"type": "mrope", "mrope_section": "abc"}),
    "rope_theta='x': must be a number": dict(rope_theta="x"),
    "hidden_act='foo': must be 'silu', 'swish', 'gelu'": dict(hidden_act="foo"),
    "field 'image_token_id' is missing": dict(image_token_id=None),
    "hidden_size='64': must be a whole number": dict(hidden_size="64"),
    "num_hidden_layers=0: must be at least 1": dict(num_hidden_layers=0),
    "rms_norm_eps='tiny': must be a number": dict(rms_norm_eps="tiny"),
    "vision_config: depth=2.5: must be a whole number": dict(vision_config=NESTED["vision_config"] | {"depth": 2.5}),
    "vision_config: fullatt_block_indexes[0]='a': must be a whole number": dict(
        vision_config=NESTED["vision_config"] | {"fullatt_block_indexes": ["a"]}
    ),
    "eos_token_id='end': must be a whole number": dict(eos_token_id="end"),
}


@pytest.mark.parametrize("message", BAD_MODEL)
def test_bad_model_configs(message):
    raw = flat(**BAD_MODEL[message])
    for config in (raw, {k: v for k, v in raw.items() if v is not None}):  # null is as good as missing
        with pytest.raises(GlimpseError) as error:
            model_config(config)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("selected_layers", "3", "selected_layers='3': must be a list"),
        ("reduce_layer", "3", "reduce_layer='3': must be a whole number"),
        ("max_remain_ratio", "many", "max_remain_ratio='many': must be a number"),
        ("attn_fuse_hidden_act", "foo", "attn_fuse_hidden_act='foo': must be 'silu', "),
        ("deep_supervision", 1, "deep_supervision=1: must be true or false"),
        ("le_layers", [0, None], "le_layers[1]=None: must be a whole number"),
    ],
)
def test_wrong_types_in_a_glimpse_config(field, value, message):
    with pytest.raises(GlimpseError) as error:
        glimpse_config(tiny.GLIMPSE | {field: value}, MODEL)
    assert message in str(error.value)
