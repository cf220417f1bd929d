"""gp-jax train --config qwen2_5_vl_7b_own_data --data.own data/own --out runs/own

Your own questions, pictures and evidence, from a few hundred rows on. First write one JSON object a line

    {"image": "a.jpg", "question": "What does the sign say?", "answer": "Exit 4", "boxes": [[40, 12, 180, 77]]}

(`gp-jax prepare --help` and docs/data.md say what else a row may hold) and

    gp-jax prepare rows.jsonl --images photos --out data/own

`--glimpse-from FOLDER_OR_ID` goes on from a trained glimpse instead of a new one.
"""

from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.training.settings import GlimpseSettings, OptimConfig, TrainConfig

train = TrainConfig(
    model="Qwen/Qwen2.5-VL-7B-Instruct",
    dtype="bfloat16",
    out="runs/qwen2_5_vl_7b_own_data",
    data=DataConfig(sources=(DataSource("data/own"),), max_visual_tokens=2048),
    glimpse=GlimpseSettings(reduce_layer=18, selected_visual_layers=(31, 23, 15, 7)),
    optim=OptimConfig(learning_rate=1e-4),
    batch_size=1,
    accumulation=8,
    epochs=3,
    log_every=5,
    save_every=100,
    validate_every=100,
)
