"""gp-jax train --config qwen3_vl_2b_gqa

A glimpse for Qwen3-VL-2B: as configs/qwen3_vl_4b_gqa.py, with another cut.
"""

from dataclasses import replace

from configs.qwen3_vl_4b_gqa import train as larger

train = replace(
    larger,
    model="Qwen/Qwen3-VL-2B-Instruct",
    out="runs/qwen3_vl_2b_gqa",
    glimpse=replace(larger.glimpse, reduce_layer=18, selected_layers=(18,), le_layers=tuple(range(28))),
)
