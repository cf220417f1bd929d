"""gp-jax train --config llava_1_5_7b_plus

As configs/qwen2_5_vl_7b_plus.py for LLaVA-1.5-7B: 32 layers, cut after layer 21.
"""

import dataclasses

from configs.qwen2_5_vl_7b_plus import train as qwen
from gp_jax.training.plus.settings import MasksConfig

train = dataclasses.replace(
    qwen, model="liuhaotian/llava-v1.5-7b", out="runs/llava_1_5_7b_plus", masks=MasksConfig(kind="reference", after=21)
)
