"""Pretrained models in and out: config, names, safetensors, the released glimpse file."""
