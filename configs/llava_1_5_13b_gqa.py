"""gp-jax train --config llava_1_5_13b_gqa

The released hyper-parameters for LLaVA-1.5-13B: those of configs/llava_1_5_7b_gqa.py but another cut.
"""

from dataclasses import replace

from configs.llava_1_5_7b_gqa import train as smaller

train = replace(
    smaller,
    model="liuhaotian/llava-v1.5-13b",
    out="runs/llava_1_5_13b_gqa",
    glimpse=replace(smaller.glimpse, reduce_layer=26, selected_layers=(26,), le_layers=tuple(range(40))),
)
