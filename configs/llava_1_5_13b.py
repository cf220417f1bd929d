"""gp-jax ask PHOTO "question" --config llava_1_5_13b"""

ask = dict(model="liuhaotian/llava-v1.5-13b", glimpse="ashun989/GlimpsePrune_LLaVA-1.5-13B", dtype="bfloat16")
