"""Where should a model be cut? python -m benchmarks.cut_depth --model scenes [--records 240]

For every layer r: exact match when, after layer r, exactly the evidence stays (oracle), as many random visual tokens, as many by the
last prompt token's attention in layer r, and none. A good r loses nothing with the oracle, much with nothing kept, and its attention
already points at the evidence. Needs no glimpse: this is how the bundled model's `reduce_layer` was chosen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from gp_jax.runtime.allocator import keep_memory


@dataclass(frozen=True)
class Args:
    """Cut depth."""

    model: str = "scenes"
    """Folder, Hub id or bundled name."""
    records: int = 240
    """Questions of the validation split."""
    retention: float = 0.074
    """Share of the visual tokens that random and attention keep."""
    layers: tuple[int, ...] = ()
    """Layers to cut after. [default: all but the last]"""
    batch: int = 16
    """Questions at a time."""
    json: Path | None = None
    """Also write the figures there."""


def main(args: Args) -> None:
    """Prints the table."""
    from tqdm import tqdm

    from gp_jax import GlimpseVLM, Prune
    from gp_jax.data.masks import evidence
    from gp_jax.data.samples import decode
    from gp_jax.evaluation.metrics import exact_match, recall
    from gp_jax.evaluation.tasks import Task
    from gp_jax.scenes.source import ScenesSource

    vlm = GlimpseVLM.from_pretrained(args.model)
    task = Task("scenes", ScenesSource("val", args.records))
    grids = [vlm.processor.plot(*entry.sizes[0]).grids[0] for entry in task.entries]
    order = sorted(range(args.records), key=lambda n: grids[n][0] * grids[n][1])
    records = [task.source[n] for n in order]
    pictures = [decode(record.images[0], record.id) for record in records]
    masks = [evidence(record, [picture.size], vlm.processor) for record, picture in zip(records, pictures, strict=True)]

    def score(rule) -> tuple[float, float]:
        """Exact match and evidence recall, in percent."""
        right, found = [], []
        for start in range(0, len(records), args.batch):
            part = slice(start, start + args.batch)
            options = dict(prune=rule(masks[part]), max_new_tokens=24)
            answers = vlm.answer(pictures[part], [record.question for record in records[part]], **options)
            right += [exact_match(a.text, r.answer) for a, r in zip(answers, records[part], strict=True)]
            found += [recall(a.keep[0], m[0]) for a, m in zip(answers, masks[part], strict=True)]
        return 100 * float(np.mean(right)), 100 * float(np.mean(found))

    layers = args.layers or tuple(range(vlm.config.text.num_hidden_layers - 1))
    share = args.retention
    plans = {
        "oracle": lambda r: lambda m: Prune(reference_masks=m, after=r),
        "random": lambda r: lambda m: Prune(method="random", fixed_remain_ratio=share, after=r),
        "attention": lambda r: lambda m: Prune(method="attention", fixed_remain_ratio=share, after=r),
        "nothing": lambda r: lambda m: Prune(method="nothing", min_remain_num=0, after=r),
    }
    dense = score(lambda m: None)[0]
    rows = []
    print(f"dense: {dense:.1f} % of {args.records} questions")
    print("r   " + "".join(f"{name:>11}" for name in plans) + "   recall of attention")
    with tqdm(total=len(layers) * len(plans), unit="plan", leave=False) as bar:
        for r in layers:
            found = {}
            for name, make in plans.items():
                found[name] = score(make(r))
                bar.update()
            rows.append({"after": r} | {name: value[0] for name, value in found.items()} | {"recall": found["attention"][1]})
            tqdm.write(f"{r:<4}" + "".join(f"{value[0]:>11.1f}" for value in found.values()) + f"{found['attention'][1]:>22.1f}")
    if args.json:
        args.json.write_text(json.dumps({"dense": dense, "records": args.records, "retention": share, "layers": rows}, indent=2) + "\n")


if __name__ == "__main__":
    keep_memory()
    main(tyro.cli(Args, description=__doc__))
