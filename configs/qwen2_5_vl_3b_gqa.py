"""gp-jax train --config qwen2_5_vl_3b_gqa

The released hyper-parameters for Qwen2.5-VL-3B: those of configs/qwen2_5_vl_7b_gqa.py, which says how to prepare the data, but another cut.
"""

from dataclasses import replace

from configs.qwen2_5_vl_7b_gqa import train as larger

train = replace(
    larger,
    model="Qwen/Qwen2.5-VL-3B-Instruct",
    out="runs/qwen2_5_vl_3b_gqa",
    glimpse=replace(larger.glimpse, reduce_layer=23, selected_layers=(23,), le_layers=tuple(range(36))),
)
