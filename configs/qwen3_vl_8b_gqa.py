"""gp-jax train --config qwen3_vl_8b_gqa

A glimpse for Qwen3-VL-8B, which nobody has released: the hyper-parameters of the released ones for Qwen2.5-VL with a cut at the same share
of the depth, conditioned on the tower's last block and the blocks of DeepStack. configs/qwen2_5_vl_7b_gqa.py says how to prepare the data,
docs/qwen3_vl.md has the whole recipe. A visual token is 32 x 32 pixels, so 2,048 of them hold a picture of 2.1 megapixels.
"""

from dataclasses import replace

from configs.qwen2_5_vl_7b_gqa import train as qwen2_5

train = replace(
    qwen2_5,
    model="Qwen/Qwen3-VL-8B-Instruct",
    out="runs/qwen3_vl_8b_gqa",
    data=replace(qwen2_5.data, max_visual_tokens=2048),
    glimpse=replace(
        qwen2_5.glimpse,
        reduce_layer=23,
        selected_layers=(23,),
        le_layers=tuple(range(36)),
        selected_visual_layers=(26, 24, 16, 8),
    ),
)
