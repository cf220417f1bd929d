"""Train the glimpse: python train.py --config configs/debug.py [--optim.learning-rate 2e-4 ...]

The same command on every host of a TPU slice, on GPUs, on a laptop. A run that is in `--out` already goes on where it stopped.
"""

import sys

from gp_jax.runtime.allocator import keep_memory

if __name__ == "__main__":
    keep_memory()
    from gp_jax.training.command import main

    sys.exit(main(sys.argv[1:]))
