"""gp-jax ask PHOTO "question" --config configs/qwen2_5_vl_3b.py"""

ask = dict(model="Qwen/Qwen2.5-VL-3B-Instruct", glimpse="ashun989/GlimpsePrune_Qwen2.5-VL-3B-Instruct", dtype="bfloat16")
