"""Random models at the proportions of released ones, with glimpse, tokenizer and processor files."""

import os
import subprocess
import sys
from pathlib import Path

from gp_jax.tiny import CONFIG, make_checkpoint

SIZES = {
    # 0.5 B parameters
    "large": dict(
        text=dict(
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            vocab_size=32768,
            rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
        ),
        vision=dict(hidden_size=640, depth=16, num_heads=8, intermediate_size=1712, fullatt_block_indexes=[3, 7, 11, 15]),
        glimpse=dict(reduce_layer=15, selected_visual_layers=[15, 11, 7, 3], attn_fuse_size=256, visual_cond_size=512),
    ),
    # 40 M: for sizes of request that the large one cannot answer in reasonable time on a CPU
    "mid": dict(
        text=dict(
            hidden_size=512,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=2048,
            vocab_size=4096,
            rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
        ),
        vision=dict(hidden_size=256, depth=8, num_heads=4, intermediate_size=1024, fullatt_block_indexes=[3, 7]),
        glimpse=dict(reduce_layer=7, selected_visual_layers=[7, 3], attn_fuse_size=128, visual_cond_size=256),
    ),
    # to try the benchmarks themselves
    "small": dict(
        text=dict(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            vocab_size=512,
            rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
        ),
        vision=dict(hidden_size=64, depth=4, num_heads=2, intermediate_size=128, fullatt_block_indexes=[1, 3]),
        glimpse=dict(reduce_layer=3, selected_visual_layers=[3, 1]),
    ),
}


def hf_config(size: str) -> dict:
    """The config.json of a size."""
    sizes = SIZES[size]
    layers = dict(selected_layers=[sizes["glimpse"]["reduce_layer"]], le_layers=list(range(sizes["text"]["num_hidden_layers"])))
    vision = CONFIG["vision_config"] | sizes["vision"] | dict(out_hidden_size=sizes["text"]["hidden_size"])
    return CONFIG | sizes["text"] | sizes["glimpse"] | layers | dict(vision_config=vision)


def write(folder: Path, size: str) -> None:
    """Writes a model in a process of its own, whose memory is nobody's."""
    command = [sys.executable, "-m", "benchmarks.random_model", str(folder), size]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1], env=os.environ | {"JAX_PLATFORMS": "cpu"})


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), hf_config=hf_config(sys.argv[2]))
