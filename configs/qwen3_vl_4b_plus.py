"""gp-jax train --config qwen3_vl_4b_plus

As configs/qwen3_vl_8b_plus.py for Qwen3-VL-4B: its 36 layers are cut after layer 23.
"""

from dataclasses import replace

from configs.qwen3_vl_8b_plus import train as larger
from gp_jax.training.plus.settings import MasksConfig

train = replace(larger, model="Qwen/Qwen3-VL-4B-Instruct", out="runs/qwen3_vl_4b_plus", masks=MasksConfig(kind="reference", after=23))
