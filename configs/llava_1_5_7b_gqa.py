"""gp-jax train --config llava_1_5_7b_gqa

The released hyper-parameters for LLaVA-1.5-7B: those of configs/qwen2_5_vl_7b_gqa.py, which says how to prepare the data, but another cut
and glimpse. Boxes are moved to the square that pictures are padded to, and the map is causal; the released training does neither:
data.released_boxes=True and loss.answer_in_denominator=True bring that back.
"""

from dataclasses import replace

from configs.qwen2_5_vl_7b_gqa import train as qwen

train = replace(
    qwen,
    model="liuhaotian/llava-v1.5-7b",
    out="runs/llava_1_5_7b_gqa",
    glimpse=replace(
        qwen.glimpse,
        reduce_layer=21,
        selected_layers=(21,),
        le_layers=tuple(range(32)),
        use_attention_logits=False,
        selected_visual_layers=(23, 17, 11, 5),
    ),
)
