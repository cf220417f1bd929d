"""gp-jax ask PHOTO "question" --config configs/llava_1_5_13b.py --glimpse FOLDER"""

ask = dict(model="llava-hf/llava-1.5-13b-hf", dtype="bfloat16")
