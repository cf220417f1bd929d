"""gp-jax ask PHOTO "question" --config llava_1_5_7b"""

ask = dict(model="liuhaotian/llava-v1.5-7b", glimpse="ashun989/GlimpsePrune_LLaVA-1.5-7B", dtype="bfloat16")
