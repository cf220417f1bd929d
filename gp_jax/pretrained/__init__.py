"""Loading and saving pretrained models: configs, names, safetensors, the released glimpse file."""
