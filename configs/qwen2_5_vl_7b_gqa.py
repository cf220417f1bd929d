"""gp-jax train --config qwen2_5_vl_7b_gqa

The released hyper-parameters for Qwen2.5-VL-7B: 20,000 questions of Visual-CoT's GQA, one epoch, 8 samples a step.
The prompt suffix is our choice: GQA's answers are single words. First:

    gp-jax prepare viscot_dataset/gqa_cot_train.jsonl --images viscot_images --out data/gqa

On a slice of 8 chips a step is one micro-batch: --batch-size 8 --accumulation 1 (on 16 chips 16 and 1). See docs/tpu.md.
"""

from gp_jax.data.settings import SHORT_ANSWER, DataConfig, DataSource
from gp_jax.training.settings import GlimpseSettings, LossConfig, OptimConfig, TrainConfig

train = TrainConfig(
    model="Qwen/Qwen2.5-VL-7B-Instruct",
    dtype="bfloat16",
    out="runs/qwen2_5_vl_7b_gqa",
    data=DataConfig(sources=(DataSource("data/gqa", sampling="random:20000", seed=42, suffix=SHORT_ANSWER),)),
    glimpse=GlimpseSettings(
        reduce_layer=18,
        selected_layers=(18,),
        le_layers=tuple(range(28)),
        le_norm_type="rmsnorm",
        le_dropout_prob=0.1,
        use_attention_logits=True,
        attn_fuse_type="AttnFuserV1",
        attn_fuse_size=256,
        attn_fuse_num_heads=4,
        attn_fuse_global=True,
        selected_visual_layers=(31, 23, 15, 7),
        visual_cond_size=512,
        deep_supervision=False,
    ),
    loss=LossConfig(language_weight=1.0, location_weight=1.0, dice_weight=1.0, bce_weight=0.1),
    optim=OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_ratio=0.1, clip_norm=1.0),
    batch_size=1,
    accumulation=8,
    epochs=1,
    log_every=10,
    save_every=500,
)
