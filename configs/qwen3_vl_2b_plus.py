"""gp-jax train --config qwen3_vl_2b_plus

As configs/qwen3_vl_8b_plus.py for Qwen3-VL-2B: its 28 layers are cut after layer 18.
"""

from dataclasses import replace

from configs.qwen3_vl_8b_plus import train as larger
from gp_jax.training.plus.settings import MasksConfig

train = replace(larger, model="Qwen/Qwen3-VL-2B-Instruct", out="runs/qwen3_vl_2b_plus", masks=MasksConfig(kind="reference", after=18))
