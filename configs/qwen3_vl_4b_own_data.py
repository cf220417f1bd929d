"""gp-jax train --config qwen3_vl_4b_own_data --data.own data/own --out runs/own

Your own questions, pictures and evidence for Qwen3-VL-4B, prepared as configs/qwen2_5_vl_7b_own_data.py says. The glimpse is that of
configs/qwen3_vl_4b_gqa.py: its cut and its conditions follow from the model, so --model may name another one.
"""

from dataclasses import replace

from configs.qwen2_5_vl_7b_own_data import train as own_data
from gp_jax.training.settings import GlimpseSettings

train = replace(own_data, model="Qwen/Qwen3-VL-4B-Instruct", out="runs/qwen3_vl_4b_own_data", glimpse=GlimpseSettings())
