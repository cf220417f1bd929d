"""What does pruning save a user? python -m benchmarks.cost [--tokens 1024 4096] [--size mid] [--out demo/cost.json]

A model of random weights at real proportions answers about one picture, dense and pruned in turns: seconds to the first token, milliseconds
per token behind it, bytes of its cache, and how many such requests fit into a memory budget beside the weights. The same numbers that
follow from sizes alone are computed for Qwen2.5-VL 7B. `eval.py --cost FILE` shows what this writes on its page; `make demo` does both.
"""

import json
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.generate import QUESTION, picture


@dataclass(frozen=True)
class Args:
    """Dense against pruned at the sizes of real pictures."""

    tokens: tuple[int, ...] = (1024, 4096)
    """Visual tokens of a picture (rounded to squares)."""
    size: Literal["large", "mid", "small"] = "mid"
    """Of the random model, see benchmarks/random_model.py: 0.5 B parameters, 40 M, or one to try this."""
    retention: float = 0.074
    """Share of the visual tokens that the cut keeps: the released glimpse's mean."""
    new_tokens: int = 16
    """Tokens of an answer."""
    rounds: int = 2
    """Timed requests of each kind; one more before them makes the programs."""
    budget: float = 1.0
    """GiB of memory for weights and caches of the random model."""
    budget_7b: float = 24.0
    """GiB of memory for weights and caches of 7B in bfloat16."""
    out: Path = Path("runs/bench/cost/cost.json")
    """File to write."""


def measure(args: Args) -> list[dict]:
    """Times and bytes of the random model, by size of the picture."""
    import jax
    from flax import nnx

    from benchmarks.random_model import hf_config
    from gp_jax import Prune
    from gp_jax.runtime.progress import announce
    from gp_jax.tiny import make_checkpoint

    found = []
    with tempfile.TemporaryDirectory() as folder:
        print("making a random model ...", file=sys.stderr)
        vlm = make_checkpoint(Path(folder), hf_config=hf_config(args.size))
        announce()
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(vlm.model)))
        kinds = {"dense": None, "pruned": Prune(fixed_remain_ratio=args.retention)}
        for tokens in args.tokens:
            image, seen = picture(round(tokens**0.5)), {name: [] for name in kinds}
            for turn in range(args.rounds + 1):
                for name, prune in kinds.items():
                    print(f"{tokens:,} visual tokens, {name}, {turn} of {args.rounds} ...", file=sys.stderr)
                    answer = vlm.answer(image, QUESTION, prune=prune, max_new_tokens=args.new_tokens, eos_token_id=None)
                    seen[name] += [answer.timings] * (turn > 0)
            inputs, row = vlm.processor([[image]], [QUESTION]).inputs, {"tokens": answer.total}
            for name, prune in kinds.items():
                kv = vlm.prefill(prune=prune, **inputs).kv
                cache = sum(layer.key.nbytes + layer.value.nbytes for layer in kv)
                first = [sum(one[stage] for stage in ("processing", "vision", "glimpse", "finish")) for one in seen[name]]
                row[name] = {
                    "first_token_s": statistics.median(first),
                    "per_token_s": statistics.median(one["decode"] for one in seen[name]) / max(1, args.new_tokens - 1),
                    "cache_bytes": cache,
                    "requests": int((args.budget * 2**30 - weights) // cache),
                }
            found.append(row)
    return found


def compute(args: Args) -> list[dict]:
    """Bytes and FLOPs of Qwen2.5-VL 7B in bfloat16, from its sizes."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gp_jax.flops import Workload, stages
    from gp_jax.models.lvlm import LVLM
    from gp_jax.pretrained.known import SIZES
    from gp_jax.training.build import glimpse_config
    from gp_jax.training.settings import GlimpseSettings

    config = SIZES["7b"]
    glimpse = glimpse_config(GlimpseSettings(), config)
    shapes = nnx.eval_shape(lambda: LVLM(config, glimpse, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(shapes)))
    found = []
    for tokens in args.tokens:
        work, row = Workload(tokens * config.vision.merge_unit, tokens, 64, args.new_tokens), {"tokens": tokens}
        for name, cuts in (("dense", ()), ("pruned", ((glimpse.reduce_layer, args.retention),))):
            cost = stages(config, glimpse if cuts else None, work, cuts, itemsize=2)
            cache = cost["kv cache"].bytes
            row[name] = {
                "prefill_flops": cost["vision"].flops + cost["merger"].flops + cost["decoder prefill"].flops,
                "cache_bytes": cache,
                "requests": int((args.budget_7b * 2**30 - weights) // cache),
            }
        found.append(row)
    return found


def main(args: Args) -> int:
    """Runs it. Returns: the exit status."""
    from gp_jax.evaluation.reporting.cost_panel import text
    from gp_jax.runtime.disk import write_text

    facts = {
        "command": " ".join(["python -m benchmarks.cost", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "size": args.size,
        "retention": args.retention,
        "new_tokens": args.new_tokens,
        "budget": args.budget,
        "budget_7b": args.budget_7b,
        "measured": measure(args),
        "computed": compute(args),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(facts, indent=1) + "\n")
    print(text(facts), end="")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    from gp_jax.runtime.allocator import keep_memory
    from gp_jax.runtime.exits import exit_status

    keep_memory()
    sys.exit(exit_status("benchmarks.cost", lambda: main(tyro.cli(Args, prog="python -m benchmarks.cost"))))
