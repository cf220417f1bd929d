"""gp-jax ask PHOTO "question" --config configs/llava_1_5_7b.py --glimpse FOLDER"""

ask = dict(model="llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
