"""The commands of `gp-jax`, one file each. What a command needs is imported when it runs: `gp-jax --help` is quick."""
