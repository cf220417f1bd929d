"""`python -m gp_jax` is `gp-jax`."""

from gp_jax.cli import main

main()
