"""gp-jax ask PHOTO "question" --config qwen2_5_vl_3b"""

ask = dict(model="Qwen/Qwen2.5-VL-3B-Instruct", glimpse="ashun989/GlimpsePrune_Qwen2.5-VL-3B-Instruct", dtype="bfloat16")
