"""What an evaluation is: the fields of `configs/eval_*.py` and the options of `eval.py`."""

import dataclasses
from dataclasses import dataclass

from gp_jax.errors import GlimpseError
from gp_jax.evaluation.plans import DEFAULT


@dataclass(frozen=True)
class EvalConfig:
    """Compare ways to prune: accuracy, what is kept, what it costs. An evaluation that is in --out already goes on."""

    model: str = "scenes"
    """Folder or Hugging Face Hub id of the base model; scenes: the bundled one."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse; by default the model folder's own."""
    tasks: tuple[str, ...] = ("scenes",)
    """scenes, scenes:SPLIT (val, test, test_ood), or a folder that gp-jax prepare wrote, FOLDER or FOLDER:SPLIT."""
    plans: tuple[str, ...] = DEFAULT
    """dense, glimpse, glimpse-PERCENT, glimpse-fixed-PERCENT, oracle, nothing, random, random-SEED; at the glimpse's retention, or
    NAME-PERCENT: attention, fastv, pyramiddrop, visionzip, divprune, cdpruner, vscan, downsample."""
    limit: int = 600
    """Records of each task."""
    start: int = 0
    """First record of generated tasks."""
    suffix: str = ""
    """Put behind every question on a line of its own."""
    max_new_tokens: int = 24
    """Length limit of answers."""
    batch: int = 8
    """Questions at a time."""
    dtype: str | None = None
    """float32 or bfloat16. [default: as stored]"""
    out: str = "runs/eval"
    """Folder of predictions.jsonl, table.md, table.csv, table.json and report/index.html."""
    report: str | None = None
    """Where the report goes. [default: report/index.html in --out]"""
    pictures: int = 60
    """Samples in the report's gallery."""
    title: str = "GlimpsePrune: accuracy against retention"
    """Of the report."""
    compilation_cache: str | None = None
    """Folder that keeps compiled programs from run to run. [default: none]"""

    def check(self) -> "EvalConfig":
        """What can be wrong before anything is loaded. Returns: itself. Raises: GlimpseError that names the field."""
        for name in ("limit", "max_new_tokens", "batch"):
            if not getattr(self, name) > 0:
                raise GlimpseError(f"{name}={getattr(self, name)!r} must be positive")
        if self.start < 0 or self.pictures < 0:
            raise GlimpseError("start and pictures must not be negative")
        if not self.model:
            raise GlimpseError("model is missing: a folder or a Hugging Face Hub id (--model)")
        if not self.tasks or not self.plans:
            raise GlimpseError("tasks and plans must not be empty")
        return self

    def identity(self) -> dict:
        """What predictions that are there already must have been made with."""
        fields = ("model", "glimpse", "start", "suffix", "max_new_tokens", "dtype")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in fields}
