"""gp-jax train --config llava_1_5_7b_own_data --data.own data/own --out runs/own

Your own questions, pictures and evidence, prepared as configs/qwen2_5_vl_7b_own_data.py says.
"""

from dataclasses import replace

from configs.qwen2_5_vl_7b_own_data import train as qwen
from gp_jax.data.settings import DataConfig
from gp_jax.training.settings import GlimpseSettings

train = replace(
    qwen,
    model="liuhaotian/llava-v1.5-7b",
    out="runs/llava_1_5_7b_own_data",
    data=DataConfig(sources=qwen.data.sources),  # a picture has 576 visual tokens, whatever its size
    glimpse=GlimpseSettings(reduce_layer=21, use_attention_logits=False, selected_visual_layers=(23, 17, 11, 5)),
)
