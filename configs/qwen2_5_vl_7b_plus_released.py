"""gp-jax train --config qwen2_5_vl_7b_plus_released

As configs/qwen2_5_vl_7b_plus.py, with the values and the mathematics of the released trainer: groups of 4, KL weight 0.04, no clipping,
dropout in the adapter, log-probabilities of the sequence that is cut before layer 0. To compare with the paper.
"""

import dataclasses

from configs.qwen2_5_vl_7b_plus import train as modern
from gp_jax.training.plus.settings import released

train = dataclasses.replace(released(modern), out="runs/qwen2_5_vl_7b_plus_released")
