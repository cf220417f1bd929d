"""gp-jax train --config qwen3_vl_4b_gqa

A glimpse for Qwen3-VL-4B: as configs/qwen3_vl_8b_gqa.py, with the blocks of the smaller vision tower.
"""

from dataclasses import replace

from configs.qwen3_vl_8b_gqa import train as larger

train = replace(
    larger,
    model="Qwen/Qwen3-VL-4B-Instruct",
    out="runs/qwen3_vl_4b_gqa",
    glimpse=replace(larger.glimpse, selected_visual_layers=(23, 17, 11, 5)),
)
