"""What an evaluation is: the fields of `configs/eval_*.py` and the options of `eval.py`."""

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Literal

from gp_jax.errors import GlimpseError
from gp_jax.evaluation.plans import DEFAULT

BRIEF = "\nAnswer the question using a single word or phrase."  # the released short-form prompt: an empty line stands before it


@dataclass(frozen=True)
class JudgeConfig:
    """A language model that scores answers 0..1, behind any OpenAI-compatible endpoint."""

    url: str = ""
    """Base URL, e.g. http://localhost:8000/v1. [default: no judge]"""
    model: str = ""
    """Name of the model, as the endpoint knows it."""
    key: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key; may be unset for local servers."""
    at_once: int = 8
    """Requests under way at a time."""
    per_minute: float = 0.0
    """Requests started per minute, retries included; 0: as many as come."""
    retries: int = 4
    """Further tries after a failed connection, a timeout, or status 408, 409, 429 and 5xx."""
    timeout: float = 60.0
    """Seconds that one try may take."""
    patience: float = 1.0
    """Seconds before the first further try, doubled for each next one; the server's Retry-After counts where it is longer."""
    max_tokens: int = 512
    """Length limit of verdicts."""
    seed: int = 0
    """Sent along; the temperature is 0."""
    cache: str | None = None
    """File that keeps verdicts. [default: verdicts.jsonl in --out]"""

    def check(self) -> None:
        """Raises: GlimpseError that names the field."""
        if not self.url:
            return
        if not self.url.startswith(("http://", "https://")):
            raise GlimpseError(f"judge.url={self.url!r} must begin with http:// or https://")
        import httpx2  # slow to import

        try:
            host = httpx2.URL(self.url).host
        except httpx2.InvalidURL as error:
            raise GlimpseError(f"judge.url={self.url!r} is not a URL ({error})") from error
        if not host:
            raise GlimpseError(f"judge.url={self.url!r} names no server")
        if not re.fullmatch(r"[!-~]*", os.environ.get(self.key, "")):  # what a header can carry; the key itself is shown nowhere
            raise GlimpseError(f"judge.key={self.key!r}: the key in this environment variable holds spaces or characters beyond ASCII")
        if not self.model:
            raise GlimpseError("judge.model is missing: the model's name at the endpoint")
        for name, least in (("at_once", 1), ("per_minute", 0), ("retries", 0), ("patience", 0), ("max_tokens", 1), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise GlimpseError(f"judge.{name}={getattr(self, name)!r} must be {least} or more")
        if not self.timeout > 0:
            raise GlimpseError(f"judge.timeout={self.timeout!r} must be positive")


@dataclass(frozen=True)
class EvalConfig:
    """Compare ways to prune: accuracy, what is kept, what it costs. An evaluation that is in --out already goes on."""

    model: str = "scenes"
    """Folder or Hugging Face Hub id of the base model; scenes: the bundled one."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse; by default the model folder's own."""
    tasks: tuple[str, ...] = ("scenes",)
    """scenes, scenes:SPLIT (val, test, test_ood); viscot:PATH, a released Visual-CoT benchmark file or a folder of them; PATH of your
    own .jsonl or .json (the formats of gp-jax prepare); FOLDER or FOLDER:SPLIT that gp-jax prepare wrote, a task per data set in it."""
    images: str | None = None
    """Folder of the pictures that viscot: and your own files name."""
    boxes: Literal["auto", "pixel", "normalized", "0-1000"] = "auto"
    """What box numbers of your own files mean, as for gp-jax prepare."""
    plans: tuple[str, ...] = DEFAULT
    """dense, glimpse, glimpse-PERCENT, glimpse-fixed-PERCENT, glimpse-above-PERCENT, oracle, nothing, random, random-SEED,
    random-SEED-PERCENT; at the glimpse's retention, or NAME-PERCENT: attention, fastv, pyramiddrop, visionzip, divprune, cdpruner, vscan,
    downsample."""
    metrics: tuple[str, ...] = ()
    """exact_match, vqa_accuracy, anls, token_f1, judge; the first is the one in tables. [default: by data set, docs/evaluation.md]"""
    prompt: Literal["free", "brief"] = "free"
    """free: the question as it is; brief: and "Answer the question using a single word or phrase."."""
    limit: int = 600
    """Records of each task, at most."""
    start: int = 0
    """First record of generated tasks."""
    scenes_seed: int = 0
    """Of generated tasks: another seed, other scenes of the same kind."""
    suffix: str = ""
    """Put behind every question on a line of its own, instead of what --prompt puts there."""
    max_new_tokens: int = 24
    """Length limit of answers. The released free-form evaluation has 1024."""
    batch: int = 8
    """Questions at a time."""
    dtype: str | None = None
    """float32 or bfloat16. [default: as stored]"""
    out: str = "runs/eval"
    """Folder of predictions.jsonl, left_out.jsonl, table.md, .csv and .json, the same by family or task, and report/index.html."""
    report: str | None = None
    """Where the report goes. [default: report/index.html in --out]"""
    pictures: int = 60
    """Samples in the report's gallery."""
    title: str = "GlimpsePrune: accuracy against retention"
    """Of the report."""
    compilation_cache: str | None = None
    """Folder that keeps compiled programs from run to run. [default: JAX_COMPILATION_CACHE_DIR, else ~/.cache/gp_jax/compiled]"""
    judge: JudgeConfig = JudgeConfig()
    """Scores answers where metrics name it."""
    devices: int = 1
    """Devices of a process that share each batch; -1: all it has."""
    coordinator: str | None = None
    """host:port of the first of several processes that share the questions and --out; not needed where JAX finds them itself."""
    processes: int | None = None
    """How many they are."""
    process: int | None = None
    """Which of them this is, from 0."""

    def check(self) -> "EvalConfig":
        """What can be wrong before anything is loaded. Returns: itself. Raises: GlimpseError that names the field."""
        for name in ("limit", "max_new_tokens", "batch"):
            if not getattr(self, name) > 0:
                raise GlimpseError(f"{name}={getattr(self, name)!r} must be positive")
        if self.start < 0 or self.pictures < 0 or self.scenes_seed < 0:
            raise GlimpseError("start, pictures and scenes_seed must not be negative")
        if not self.model:
            raise GlimpseError("model is missing: a folder or a Hugging Face Hub id (--model)")
        if not self.tasks or not self.plans:
            raise GlimpseError("tasks and plans must not be empty")
        if self.devices == 0 or self.devices < -1:
            raise GlimpseError(f"devices={self.devices} must be positive, or -1 for all")
        self.judge.check()
        return self

    @property
    def ending(self) -> str:
        """What follows the line break behind every question; empty: nothing does."""
        return self.suffix or (BRIEF if self.prompt == "brief" else "")

    def identity(self) -> dict:
        """What predictions that are there already must have been made with."""
        fields = ("model", "glimpse", "start", "max_new_tokens", "dtype")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in fields} | {"suffix": self.ending}
