"""gp-jax train --config qwen2_5_vl_3b_plus

As configs/qwen2_5_vl_7b_plus.py for Qwen2.5-VL-3B: its 36 layers are cut after layer 23.
"""

import dataclasses

from configs.qwen2_5_vl_7b_plus import train as larger
from gp_jax.training.plus.settings import MasksConfig

train = dataclasses.replace(
    larger, model="Qwen/Qwen2.5-VL-3B-Instruct", out="runs/qwen2_5_vl_3b_plus", masks=MasksConfig(kind="reference", after=23)
)
