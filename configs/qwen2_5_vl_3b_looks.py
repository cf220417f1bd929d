"""gp-jax train --config qwen2_5_vl_3b_looks --data.own data/labels --out runs/looks

configs/qwen2_5_vl_7b_looks.py for Qwen2.5-VL-3B; that file says how to make the data.
"""

from dataclasses import replace

from configs.qwen2_5_vl_3b_own_data import train as own
from configs.qwen2_5_vl_7b_looks import train as larger

train = replace(
    larger,
    model=own.model,
    glimpse=own.glimpse,
    glimpse_from="ashun989/GlimpsePrune_Qwen2.5-VL-3B-Instruct",
    out="runs/qwen2_5_vl_3b_looks",
)
