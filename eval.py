"""Compare ways to prune: python eval.py --config configs/eval_scenes.py [--plans dense glimpse random] [--limit 200]

Answers every question under every plan on one engine and writes a table and a report. It goes on where a stopped run ended. The same as
`gp-jax eval`.
"""

import sys

from gp_jax.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]], "eval.py")
