"""The large vision-language model: a vision tower, the decoder and, when there is one, the glimpse with its predictor."""

import jax.numpy as jnp
from flax import nnx

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.glimpse.predictor import make_predictor
from gp_jax.glimpse.prompt import GlimpsePrompt
from gp_jax.models.decoder import Decoder


class LVLM(nnx.Module):
    """Only the parts; the forward pass is in `pipeline`."""

    def __init__(self, config: ModelConfig, glimpse: GlimpseConfig | None, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config, self.glimpse_config = config, glimpse
        self.vision = config.family.tower.load()(config.vision, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.text, dtype=dtype, rngs=rngs)
        self.glimpse = GlimpsePrompt(glimpse, config.text, rngs=rngs) if glimpse and glimpse.rows else None
        self.predictor = make_predictor(glimpse, config, dtype=dtype, rngs=rngs) if glimpse else None
