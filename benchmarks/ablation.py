"""What does every part of the glimpse bring? python -m benchmarks.ablation [--steps 600] [--records 600]

The paper's ablation (arXiv 2508.01548, table 6) on the bundled model, in its order and at equal retention: attention without
training, + glimpse token (answers' loss only), + localisation loss, + predictor, + visual condition. Trains four glimpses with
configs/scenes_glimpse.py, each resumable in its own run folder.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from gp_jax.runtime.allocator import keep_memory

# What each row changes of configs/scenes_glimpse.py.
ROWS = {
    "attention, not trained": None,
    "+ glimpse token": ("--glimpse.attn-fuse-type", "mean", "--loss.location-weight", "0"),
    "+ localisation loss": ("--glimpse.attn-fuse-type", "mean"),
    "+ predictor": ("--glimpse.attn-fuse-type", "AttnFuserV2"),
    "+ visual condition": ("--glimpse.attn-fuse-type", "AttnFuserV1"),
}


@dataclass(frozen=True)
class Args:
    """Ablation of the glimpse."""

    config: Path = Path("configs/scenes_glimpse.py")
    """Training configuration."""
    model: str = "scenes"
    """Base model."""
    steps: int | None = None
    """Training steps of each row. [default: the configuration's]"""
    records: int = 600
    """Test questions."""
    retention: float = 0.074
    """Share of the visual tokens that every row keeps."""
    out: Path = Path("runs/ablation")
    """Run folders, predictions, table.json."""
    batch: int = 16
    """Questions at a time."""


def train(args: Args, name: str, options: tuple[str, ...]) -> Path:
    """Trains a row's glimpse. Returns: the folder of the exported glimpse."""
    out = args.out / name.strip("+ ").replace(" ", "_")
    if not (out / "export").exists():
        steps = () if args.steps is None else ("--steps", str(args.steps))
        command = (sys.executable, "train.py", "--config", str(args.config), "--model", args.model, "--out", str(out), *options, *steps)
        subprocess.run(command, check=True)
    return out / "export"


def main(args: Args) -> None:
    """Trains, evaluates, prints the table."""
    from gp_jax import GlimpseVLM, Prune
    from gp_jax.evaluation.command import claim
    from gp_jax.evaluation.plans import EvalPlan
    from gp_jax.evaluation.reporting.plan_rows import aggregate
    from gp_jax.evaluation.runner import Runner
    from gp_jax.evaluation.tasks import Task
    from gp_jax.pretrained.checkpoint import ALL_FILES
    from gp_jax.pretrained.files import find_folder
    from gp_jax.pretrained.identity import folder_identity
    from gp_jax.scenes.source import ScenesSource

    made_with = {name: str(getattr(args, name)) for name in ("config", "model", "steps", "retention")}
    for line in claim(args.out, made_with | {"files": folder_identity(find_folder(args.model, ALL_FILES))}):
        print(line)
    task = Task("scenes", ScenesSource("test", args.records))
    folders = {name: None if options is None else train(args, name, options) for name, options in ROWS.items()}
    after = next(iter(json.loads((folder / "config.json").read_text())["reduce_layer"] for folder in folders.values() if folder))
    found = []
    for name, folder in folders.items():
        method = "attention" if folder is None else "glimpse"
        rule = Prune(method=method, fixed_remain_ratio=args.retention, after=after)
        vlm = GlimpseVLM.from_pretrained(args.model, glimpse=folder)
        plans = [EvalPlan("dense", lambda masks, ratio: None)] if folder is None else []
        plans.append(EvalPlan(name, lambda masks, ratio, rule=rule: rule))
        found += Runner(vlm, task, args.out / "predictions.jsonl", args.batch).run(plans)
    rows = aggregate(found)
    print(f"\n{args.records} test questions, {args.retention:.1%} of the visual tokens kept after layer {after}\n")
    print(f"{'':26}{'exact match':>22}{'evidence recall':>18}")
    for row in rows:
        exact, recall = row.metrics["exact_match"], row.metrics.get("recall")
        interval = f"{100 * exact.mean:.1f} ({100 * exact.low:.1f}..{100 * exact.high:.1f})"
        print(f"{row.plan:26}{interval:>22}{f'{100 * recall.mean:.1f}' if recall else '':>18}")
    table = [{"row": r.plan} | {name: vars(value) for name, value in r.metrics.items()} for r in rows]
    (args.out / "table.json").write_text(json.dumps({"retention": args.retention, "rows": table}, indent=2) + "\n")


if __name__ == "__main__":
    keep_memory()
    main(tyro.cli(Args, description=__doc__))
