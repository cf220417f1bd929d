"""A small random model of the scenes kind."""

import json
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from gp_jax import GlimpseVLM, Ladder, Ladders
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.hf_config import model_config
from gp_jax.pretrained.saving import save_model
from gp_jax.scenes.architecture import write_architecture

# The default ladders are finer; the suite's time is compilation.
LADDERS = Ladders(
    patches=Ladder("patches", (512, 1024, 1792, 4096)),
    prompt=Ladder("prompt", (160, 352, 480, 1088)),
    kept=Ladder("kept", (64, 160, 480)),
    decode=Ladder("decode", (32,)),
)


def small_architecture(folder: Path) -> Path:
    """The bundled model's architecture with two layers and two blocks."""
    write_architecture(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 3
    config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    path.write_text(json.dumps(config))
    return folder


def small_model(folder: Path, architecture: Path, seed: int = 0) -> GlimpseVLM:
    """Random weights for it, in a model folder without a glimpse."""
    hf_config = json.loads((architecture / "config.json").read_text())
    config = model_config(hf_config, json.loads((architecture / "generation_config.json").read_text()))
    model = LVLM(config, None, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    for _, variable in nnx.to_flat_state(nnx.state(model)):  # larger than at initialisation, so that attention matters
        if variable.ndim == 2:
            variable.set_value(variable[...] * 4)
    save_model(model, hf_config, folder, source=architecture, nested=True)
    return GlimpseVLM.from_pretrained(folder, ladders=LADDERS)
