"""`config.json` of the families beside the bundled one."""

GLIMPSE = dict(
    selected_layers=[1],
    reduce_layer=1,
    le_layers=[0, 1],
    le_length=1,
    use_attention_logits=False,
    attn_fuse_size=16,
    attn_fuse_num_heads=2,
    selected_visual_layers=[3, 1],
    visual_cond_size=16,
    anchor_positions=["tl"],
    reduce_threshold=0.5,
    max_remain_ratio=None,
    min_remain_num=1,
)
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14)
TEXT = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=272,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
ORIGINAL = (
    TEXT
    | GLIMPSE
    | dict(
        model_type="llava_llama",
        mm_vision_tower="tower",
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        image_aspect_ratio="pad",
        vision_config=VISION,
    )
)
LLAVA = GLIMPSE | dict(
    model_type="llava",
    image_token_index=259,
    vision_config=VISION | {"model_type": "clip_vision_model"},
    text_config=TEXT,
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
    projector_hidden_act="gelu",
    multimodal_projector_bias=True,
)
NEXT = LLAVA | dict(model_type="llava_next", image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]])
NESTED = GLIMPSE | dict(
    model_type="qwen2_5_vl",
    image_token_id=93,
    video_token_id=94,
    tie_word_embeddings=False,
    text_config=TEXT
    | dict(model_type="qwen2_5_vl_text", rope_parameters=dict(rope_theta=1e6, rope_type="default", mrope_section=[1, 1, 2])),
    vision_config=dict(
        depth=4,
        hidden_size=24,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=32,
        patch_size=14,
        window_size=56,
        fullatt_block_indexes=[1, 3],
        temporal_patch_size=2,
        spatial_merge_size=2,
    ),
)
QWEN3 = NESTED | dict(
    model_type="qwen3_vl",
    attn_fuse_global=True,
    text_config=TEXT
    | dict(
        model_type="qwen3_vl_text",
        head_dim=12,
        rope_scaling=dict(mrope_interleaved=True, rope_type="default", mrope_section=[2, 2, 2]),
    ),
    vision_config=dict(
        depth=4,
        hidden_size=24,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=32,
        patch_size=16,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 1, 3],
    ),
)
FAMILIES = (ORIGINAL, LLAVA, NEXT, NESTED, QWEN3)
