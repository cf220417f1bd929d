"""python train.py --config configs/llava_1_5_7b_gqa.py

The released hyper-parameters for LLaVA-1.5-7B: 20,000 questions of Visual-CoT's GQA, one epoch, 8 samples a step. Boxes are moved to the
square that pictures are padded to, and the map is causal; the released training does neither: data.released_boxes=True and
loss.answer_in_denominator=True bring that back. The prompt suffix is our choice: GQA's answers are single words. First:

    gp-jax prepare viscot_dataset/gqa_cot_train.jsonl --images viscot_images --out data/gqa
"""

from gp_jax.data.settings import SHORT_ANSWER, DataConfig, DataSource
from gp_jax.training.settings import GlimpseSettings, LossConfig, OptimConfig, TrainConfig

train = TrainConfig(
    model="liuhaotian/llava-v1.5-7b",
    dtype="bfloat16",
    out="runs/llava_1_5_7b_gqa",
    data=DataConfig(sources=(DataSource("data/gqa", sampling="random:20000", seed=42, suffix=SHORT_ANSWER),)),
    glimpse=GlimpseSettings(
        reduce_layer=21,
        selected_layers=(21,),
        le_layers=tuple(range(32)),
        le_norm_type="rmsnorm",
        le_dropout_prob=0.1,
        use_attention_logits=False,
        attn_fuse_type="AttnFuserV1",
        attn_fuse_size=256,
        attn_fuse_num_heads=4,
        attn_fuse_global=True,
        selected_visual_layers=(23, 17, 11, 5),
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
