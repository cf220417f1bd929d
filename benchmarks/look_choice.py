"""Which windows do first looks choose, and is the evidence in them? python -m benchmarks.look_choice [--count 300] [--shares 0.25 0.125]

For choosing the settings of a `Look` in minutes, without answering: the maps of first looks at validation scenes, and what every rule makes
of them. seen: share of the visual tokens in the second look, unsure maps as whole pictures; evidence: share of its visual tokens that are
seen; all of it: share of the questions with all of them; unsure: of the questions seen whole; FLOPs: vision and prefill over dense, cut as
without a look.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Args:
    """Compare rules of a first look."""

    model: str = "scenes"
    """Folder or Hub id of the base model."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse."""
    split: str = "val"
    """Split of the scenes: not the one that you report."""
    count: int = 300
    """Questions."""
    tokens: tuple[int, int] | None = None
    """Least and most visual tokens of the pictures. [default: the usual ones]"""
    shares: tuple[float, ...] = (0.25, 0.125)
    """Shares of the visual tokens that the first look has."""
    thresholds: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """Thresholds."""
    margins: tuple[int, ...] = (0, 1)
    """Margins, in windows."""
    sures: tuple[float, ...] = (0.0, 0.3, 0.5)
    """Importance without which a map is unsure."""
    cap: float = 0.6
    """Share of the windows above which a map is unsure."""
    floor: float = 0.1
    """Share of the windows that is always chosen."""
    retention: float = 0.06
    """Share of the visual tokens that the cut keeps, for FLOPs."""
    least: int = 16
    """Visual tokens of a first look at least."""
    batch: int = 16
    """Questions per batch."""
    out: Path = Path("runs/bench/look_choice")
    """Folder of look_choice.json."""


def maps_of(args: Args, vlm, share: float) -> Iterator[tuple]:
    """Samples with the maps of their first looks, and their evidence (N,) bool. Questions without a first look are left out."""
    from gp_jax.data.masks import evidence
    from gp_jax.inference.look_inputs import first_looks
    from gp_jax.inference.looks import importance
    from gp_jax.processing.images import decode
    from gp_jax.processing.layout import ARRAYS, FirstLook, read_samples
    from gp_jax.processing.looks import source_tokens
    from gp_jax.pruning.look import Look
    from gp_jax.runtime.progress import Progress
    from gp_jax.scenes.source import ScenesSource

    source = ScenesSource(args.split, args.count, tokens=args.tokens)
    starts = range(0, args.count, args.batch)
    for numbers in Progress(
        [range(start, min(args.count, start + args.batch)) for start in starts], desc=f"first looks at {share:.1%}", unit="batch"
    ):
        records = [source[n] for n in numbers]
        pictures = [decode(record.images[0], record.id) for record in records]
        raw = vlm.processor([[picture] for picture in pictures], [record.question for record in records]).inputs
        samples = read_samples(vlm.config, *(raw.get(name) for name in ARRAYS))
        firsts = first_looks(vlm.config, vlm.glimpse_config, samples, Look(share=share, least=args.least))
        maps = importance(vlm.engine, [first for first in firsts if first is not None])
        for sample, first, record, picture in zip(samples, firsts, records, pictures, strict=True):
            if first is not None:
                (mask,) = evidence(record, [picture.size], vlm.processor)
                looked = FirstLook(first.grids, next(maps)[source_tokens(sample, first)])
                yield replace(sample, first_look=looked), mask.reshape(-1)


def judged(vlm, found: list[tuple], look, retention: float) -> dict[str, float]:
    """What a rule makes of first looks: see above."""
    import numpy as np

    from gp_jax.flops import Workload, first_look, stages
    from gp_jax.inference.looks import chosen_windows
    from gp_jax.processing.looks import present_windows, second_look, window_sizes, windows_of_tokens

    config, glimpse = vlm.config, vlm.glimpse_config
    rows, spent, dense = [], 0, 0
    for sample, evidence in found:
        windows = chosen_windows(config, sample, look)
        seen, whole = windows[windows_of_tokens(sample)], bool(windows[present_windows(sample)].all())
        hit = float(seen[evidence].mean()) if evidence.any() else 1.0
        rows.append((seen.mean(), hit, hit == 1.0, whole))
        text = sample.ids.size - sample.count
        work = Workload.of(config.vision, sample.grids, text, 1)
        short = work.seeing(config.vision, window_sizes(second_look(config, sample, windows)))
        spent += first_look(config, glimpse, Workload.of(config.vision, sample.first_look.grids, text, 1)).flops
        spent += stages(config, glimpse, short, [(glimpse.reduce_layer, min(1.0, retention * sample.total / short.visual))])[
            "prefill"
        ].flops
        dense += stages(config, None, work)["prefill"].flops
    return dict(zip(("seen", "evidence", "all of it", "unsure"), np.mean(rows, axis=0).tolist(), strict=True)) | {"FLOPs": spent / dense}


def main(args: Args) -> int:
    """Prints a table and writes it. Returns: exit status."""
    from gp_jax import GlimpseVLM, Look

    vlm, lines = GlimpseVLM.from_pretrained(args.model, glimpse=args.glimpse), []
    print(f"{args.split}, cap {args.cap:.0%}, floor {args.floor:.0%}")
    for share in args.shares:
        found = list(maps_of(args, vlm, share))
        for threshold, margin, sure in itertools.product(args.thresholds, args.margins, args.sures):
            look = Look(share=share, least=args.least, threshold=threshold, margin=margin, sure=sure, cap=args.cap, floor=args.floor)
            settings = dict(share=share, threshold=threshold, margin=margin, sure=sure, questions=len(found))
            lines.append(settings | judged(vlm, found, look, args.retention))
            if len(lines) == 1:
                print("".join(f"{name:>11}" for name in lines[0]))
            print("".join(f"{value:11.1%}" if isinstance(value, float) else f"{value:11}" for value in lines[-1].values()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = args.out / ".look_choice.partial"
    settings = asdict(args) | {"out": str(args.out)}
    scratch.write_text(json.dumps(dict(settings=settings, rules=lines), indent=1))
    scratch.replace(args.out / "look_choice.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.look_choice")))
