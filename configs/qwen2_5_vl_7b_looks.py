"""gp-jax train --config qwen2_5_vl_7b_looks --data.own data/labels --out runs/looks

Two looks for Qwen2.5-VL-7B: the released glimpse goes on with a third of the pictures at the size of a first look. Boxes are not needed:
questions about your own pictures get their evidence from the glimpse's own map of the whole picture (docs/looks.md).

    gp-jax label rows.jsonl --images photos --out photos/labels --model Qwen/Qwen2.5-VL-7B-Instruct \
        --glimpse ashun989/GlimpsePrune_Qwen2.5-VL-7B-Instruct --dtype bfloat16
    gp-jax prepare photos/labels/rows.jsonl --images photos --out data/labels
"""

from dataclasses import replace

from configs.qwen2_5_vl_7b_own_data import train as own

train = replace(
    own,
    glimpse_from="ashun989/GlimpsePrune_Qwen2.5-VL-7B-Instruct",
    out="runs/qwen2_5_vl_7b_looks",
    data=replace(own.data, looks=0.35, look_shares=(0.25, 0.125, 0.0625), look_least=64, max_visual_tokens=4096),
    optim=replace(own.optim, learning_rate=5e-5),
    epochs=1,
)
