"""gp-jax train --config qwen3_vl_8b_plus

GlimpsePrune+ for Qwen3-VL-8B: as configs/qwen2_5_vl_7b_plus.py, which says how to prepare the data and the judge; its 36 layers are cut
after layer 23. The glimpse of the merged model is then trained with configs/qwen3_vl_8b_gqa.py.
"""

from dataclasses import replace

from configs.qwen2_5_vl_7b_plus import train as qwen2_5
from gp_jax.training.plus.settings import MasksConfig

train = replace(
    qwen2_5,
    model="Qwen/Qwen3-VL-8B-Instruct",
    out="runs/qwen3_vl_8b_plus",
    data=replace(qwen2_5.data, max_visual_tokens=2048),
    masks=MasksConfig(kind="reference", after=23),
)
