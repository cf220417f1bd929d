"""Train the glimpse: python train.py --config configs/debug.py [--optim.learning-rate 2e-4 ...]

The same command on every host of a TPU slice, on GPUs, on a laptop. A run that is in `--out` already goes on where it stopped. The same as
`gp-jax train`.
"""

import sys

from gp_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], "train.py")
