"""gp-jax train --config qwen2_5_vl_3b_own_data --data.own data/own --out runs/own

Your own questions, pictures and evidence, prepared as configs/qwen2_5_vl_7b_own_data.py says.
"""

from dataclasses import replace

from configs.qwen2_5_vl_7b_own_data import train as larger

train = replace(
    larger,
    model="Qwen/Qwen2.5-VL-3B-Instruct",
    out="runs/qwen2_5_vl_3b_own_data",
    glimpse=replace(larger.glimpse, reduce_layer=23),
)
