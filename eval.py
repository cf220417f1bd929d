"""Compare ways to prune: python eval.py --config configs/eval_scenes.py [--plans dense glimpse random] [--limit 200]

Answers every question under every plan on one engine and writes a table and a report. It goes on where a stopped run ended.
"""

import sys

from gp_jax.runtime.allocator import keep_memory

if __name__ == "__main__":
    keep_memory()
    from gp_jax.evaluation.command import main

    sys.exit(main(sys.argv[1:]))
