"""What an evaluation is: the fields of `configs/eval_*.py` and the options of `eval.py`."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from typing import Literal

from gp_jax import __version__
from gp_jax.errors import GlimpseError
from gp_jax.evaluation.plans import DEFAULT
from gp_jax.evaluation.redaction import bare_url, shown_url
from gp_jax.runtime.disk import kind_of, path_of

MOST_SECONDS = 86_400.0  # of one try
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
            raise GlimpseError(f"judge.url={self.shown!r} must begin with http:// or https://")
        import httpx2  # slow to import

        try:
            host = httpx2.URL(self.url).host
        except httpx2.InvalidURL as error:
            why = "" if "@" in self.url else f" ({error})"  # which quotes a part of the URL
            raise GlimpseError(f"judge.url={self.shown!r} is not a URL{why}") from error
        if not host:
            raise GlimpseError(f"judge.url={self.shown!r} names no server")
        if set("?#") & set(bare_url(self.url)):
            raise GlimpseError(f"judge.url={self.shown!r} goes on with ? or #, but /chat/completions must follow it")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key):
            raise GlimpseError("judge.key is not the name of an environment variable; the key itself belongs into that variable")
        if not re.fullmatch(r"[!-~]*", os.environ.get(self.key, "")):  # what a header can carry; the key itself is shown nowhere
            raise GlimpseError(f"judge.key={self.key!r}: the key in this environment variable holds spaces or characters beyond ASCII")
        if not self.model:
            raise GlimpseError("judge.model is missing: the model's name at the endpoint")
        for name, least in (("at_once", 1), ("per_minute", 0), ("retries", 0), ("patience", 0), ("max_tokens", 1), ("seed", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise GlimpseError(f"judge.{name}={getattr(self, name)!r} must be {least} or more")
        if not 0 < self.timeout <= MOST_SECONDS:
            raise GlimpseError(f"judge.timeout={self.timeout!r} must be in 0..{MOST_SECONDS}")
        if self.cache is not None and kind_of(path_of(self.cache)) in ("folder", "other"):
            raise GlimpseError(f"judge.cache={self.cache!r} is not a regular file")

    @property
    def shown(self) -> str:
        """The URL without user and password."""
        return shown_url(self.url)


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
    """dense, glimpse, glimpse-PERCENT, glimpse-fixed-PERCENT, glimpse-above-PERCENT, oracle, nothing, random-SEED-PERCENT, NAME-PERCENT;
    with as many visual tokens of every sample as the glimpse keeps: random, random-SEED, attention, fastv, pyramiddrop, visionzip,
    divprune, cdpruner, vscan, downsample; with as many in total, one share for all samples: NAME-pooled."""
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
        if not self.out:
            raise GlimpseError("out is missing: the folder of the evaluation (--out)")
        if "://" in self.out:
            raise GlimpseError(f"out={self.out!r} must be a folder of this machine, not a URI")
        for name in (self.out, self.report):
            if name is not None:
                kind_of(path_of(name))
        self.judge.check()
        return self

    @property
    def ending(self) -> str:
        """What follows the line break behind every question; empty: nothing does."""
        return self.suffix or (BRIEF if self.prompt == "brief" else "")

    @property
    def settings(self) -> dict:
        """Those that predictions depend on."""
        fields = ("model", "glimpse", "start", "max_new_tokens", "dtype")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in fields} | {"suffix": self.ending}

    def identity(self) -> dict:
        """What predictions that are there already must have been made with: settings, every file of the model's and the glimpse's folder
        that decides an answer, and the programs that read them."""
        from importlib.metadata import version

        from gp_jax.pretrained.files import find_folder  # slow to import
        from gp_jax.pretrained.identity import folder_identity
        from gp_jax.vlm import ALL_FILES

        files = {}
        for part, name in (("model", self.model), ("glimpse", self.glimpse)):
            if name:
                files |= {f"{part}/{file}": digest for file, digest in folder_identity(find_folder(name, ALL_FILES)).items()}
        return self.settings | {"gp_jax": __version__, "transformers": version("transformers"), "files": files}
