"""The inference function as a folder that needs no gp_jax."""
