"""Where should a model be cut? python -m benchmarks.cut_depth --model scenes [--data scenes] [--records 240]

For every layer r: exact match when, after layer r, exactly the evidence stays (oracle), as many random visual tokens, as many by the
last prompt token's attention in layer r, and none. A good r loses nothing with the oracle, much with nothing kept, and its attention
already points at the evidence. Needs no glimpse: this is how the bundled model's `reduce_layer` was chosen.

For any other model give questions with evidence, a folder of `gp-jax prepare`:

    python -m benchmarks.cut_depth --model Qwen/Qwen3-VL-4B-Instruct --dtype bfloat16 --data data/gqa --split val --layers 17 20 23 26

With `--glimpse` and `--thresholds` a second table says what a trained glimpse keeps at each of them, and what it costs in answers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from gp_jax.data.settings import SHORT_ANSWER
from gp_jax.runtime.allocator import keep_memory


@dataclass(frozen=True)
class Args:
    """Cut depth."""

    model: str = "scenes"
    """Folder, Hub id or bundled name."""
    glimpse: str | None = None
    """Folder or Hub id of a glimpse, for --thresholds. [default: the model folder's own]"""
    dtype: str | None = None
    """Type of the weights: float32 or bfloat16. [default: as stored]"""
    data: str = "scenes"
    """Questions with evidence: a folder of `gp-jax prepare`, or scenes for generated ones."""
    split: str = "val"
    """Split of the folder."""
    suffix: str | None = None
    """Text behind every question. [default: the one for short answers; scenes: none]"""
    records: int = 240
    """Questions, from the first on; those without evidence are left out."""
    max_visual_tokens: int | None = 1024
    """Larger pictures are scaled down."""
    retention: float = 0.074
    """Share of the visual tokens that random and attention keep."""
    layers: tuple[int, ...] = ()
    """Layers to cut after. [default: all but the last]"""
    thresholds: tuple[float, ...] = ()
    """Thresholds of the glimpse to try, e.g. 0.3 0.5 0.7. [default: none]"""
    batch: int = 16
    """Questions at a time."""
    max_new_tokens: int = 24
    """Tokens of an answer."""
    json: Path | None = None
    """Also write the figures there."""


@dataclass(frozen=True)
class Question:
    """A record that was read: its pictures, its text, the answer, and its evidence, flat over its visual tokens."""

    pictures: list[Any]
    text: str
    answer: str
    evidence: np.ndarray


def read(args: Args, processor: Any) -> list[Question]:
    """The questions that have evidence, small pictures first. Raises: GlimpseError when there are none."""
    from gp_jax.data.masks import evidence
    from gp_jax.data.samples import question_text
    from gp_jax.data.settings import DataSource
    from gp_jax.errors import GlimpseError
    from gp_jax.processing.images import decode
    from gp_jax.training.build import open_source

    scenes = args.data == "scenes"
    source = open_source(DataSource(f"scenes:{args.records}" if scenes else args.data, split=args.split))
    suffix = args.suffix if args.suffix is not None else "" if scenes else SHORT_ANSWER
    found = []
    for number in range(min(args.records, len(source.entries))):
        record = source[number]
        pictures = [decode(encoded, record.id) for encoded in record.images]
        masks = evidence(record, [picture.size for picture in pictures], processor)
        flat = np.concatenate([mask.reshape(-1) for mask in masks]) if masks else np.zeros(0, bool)
        if flat.any():
            found.append(Question(pictures, question_text(record.question, suffix), record.answer, flat))
    if not found:
        raise GlimpseError(f"--data {args.data}: none of its first {args.records} records of split {args.split} has evidence")
    return sorted(found, key=lambda question: question.evidence.size)


def main(args: Args) -> None:
    """Prints the tables."""
    from gp_jax import GlimpseVLM, Prune
    from gp_jax.errors import GlimpseError
    from gp_jax.evaluation.metrics import exact_match, recall
    from gp_jax.runtime.progress import Progress

    vlm = GlimpseVLM.from_pretrained(args.model, glimpse=args.glimpse, dtype=args.dtype)
    if args.thresholds and vlm.glimpse_config is None:
        raise GlimpseError("--thresholds needs a glimpse: --glimpse FOLDER_OR_ID")
    if args.max_visual_tokens and vlm.processor.shrinks:
        vlm.processor = vlm.processor.limited(args.max_visual_tokens)
    questions = read(args, vlm.processor)

    def score(rule: Callable[[Sequence[np.ndarray]], Prune | None]) -> dict[str, float]:
        """Exact match and evidence recall, in percent, and the share of the visual tokens that stays."""
        right, found, kept = [], [], []
        for start in range(0, len(questions), args.batch):
            part = questions[start : start + args.batch]
            asked = [question.pictures for question in part], [question.text for question in part]
            answers = vlm.answer(*asked, prune=rule([question.evidence for question in part]), max_new_tokens=args.max_new_tokens)
            for answer, question in zip(answers, part, strict=True):
                keep = np.concatenate([np.reshape(mask, -1) for mask in answer.keep])
                right.append(exact_match(answer.text, question.answer))
                found.append(recall(keep, question.evidence))
                kept.append(keep.mean())
        return {"right": 100 * float(np.mean(right)), "recall": 100 * float(np.mean(found)), "kept": 100 * float(np.mean(kept))}

    layers = args.layers or tuple(range(vlm.config.text.num_hidden_layers - 1))
    share = args.retention
    plans = {
        "oracle": lambda r: lambda m: Prune(reference_masks=m, after=r),
        "random": lambda r: lambda m: Prune(method="random", fixed_remain_ratio=share, after=r),
        "attention": lambda r: lambda m: Prune(method="attention", fixed_remain_ratio=share, after=r),
        "nothing": lambda r: lambda m: Prune(method="nothing", min_remain_num=0, after=r),
    }
    dense = score(lambda m: None)["right"]
    rows, thresholds = [], []
    print(f"dense: {dense:.1f} % of {len(questions)} questions")
    print("r   " + "".join(f"{name:>11}" for name in plans) + "   recall of attention")
    with Progress(total=len(layers) * len(plans) + len(args.thresholds), desc="plans", unit="plan", leave=False) as bar:
        for r in layers:
            found = {}
            for name, make in plans.items():
                found[name] = score(make(r))
                bar.update()
            recalled = found["attention"]["recall"]
            rows.append({"after": r} | {name: value["right"] for name, value in found.items()} | {"recall": recalled})
            Progress.write(f"{r:<4}" + "".join(f"{value['right']:>11.1f}" for value in found.values()) + f"{recalled:>22.1f}")
        if args.thresholds:
            Progress.write("threshold   exact match   kept (%)   recall")
        for threshold in args.thresholds:
            own = score(lambda m, threshold=threshold: Prune(reduce_threshold=threshold))
            bar.update()
            thresholds.append({"threshold": threshold} | own)
            Progress.write(f"{threshold:<12g}{own['right']:>11.1f}{own['kept']:>11.1f}{own['recall']:>9.1f}")
    if args.json:
        facts = {"dense": dense, "records": len(questions), "retention": share, "layers": rows, "thresholds": thresholds}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    from gp_jax.runtime.exits import exit_status

    keep_memory()
    raise SystemExit(exit_status("benchmarks.cut_depth", lambda: main(tyro.cli(Args, description=__doc__))))
