"""Settings of an evaluation: the fields of `configs/eval_*.py` and the options of `eval.py`."""

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

MOST_SECONDS = 86_400.0  # longest timeout of one try
BRIEF = "\nAnswer the question using a single word or phrase."  # the released short-form prompt, with an empty line before it


@dataclass(frozen=True)
class JudgeConfig:
    """A language model that scores answers 0..1, behind any OpenAI-compatible endpoint."""

    url: str = ""
    """Base URL, e.g. http://localhost:8000/v1. [default: no judge]"""
    model: str = ""
    """Name of the model, as the endpoint knows it."""
    key: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key; may be unset for local servers."""
    at_once: int = 8
    """Requests at a time."""
    per_minute: float = 0.0
    """Requests per minute at most, retries included; 0: no limit."""
    retries: int = 4
    """Retries after a failed connection, a timeout, or status 408, 409, 429 and 5xx."""
    timeout: float = 60.0
    """Seconds that one try may take at most."""
    patience: float = 1.0
    """Seconds before the first retry, doubled for each next one; a longer Retry-After of the server is respected."""
    max_tokens: int = 512
    """Length limit of a verdict, in tokens."""
    seed: int = 0
    """Seed that is sent with each request; the temperature is 0."""
    cache: str | None = None
    """File that stores verdicts. [default: verdicts.jsonl in --out]"""

    def check(self) -> None:
        """Checks all fields. Raises: GlimpseError that names the field."""
        if not self.url:
            return
        if not self.url.startswith(("http://", "https://")):
            raise GlimpseError(f"judge.url={self.shown!r} must begin with http:// or https://")
        import httpx2  # slow to import

        try:
            host = httpx2.URL(self.url).host
        except httpx2.InvalidURL as error:
            why = "" if "@" in self.url else f" ({error})"  # the error quotes a part of the URL, which may be a password
            raise GlimpseError(f"judge.url={self.shown!r} is not a URL{why}") from error
        if not host:
            raise GlimpseError(f"judge.url={self.shown!r} names no server")
        if set("?#") & set(bare_url(self.url)):
            raise GlimpseError(f"judge.url={self.shown!r} goes on with ? or #, but /chat/completions must follow it")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key):
            raise GlimpseError("judge.key is not the name of an environment variable; the key itself belongs in that variable")
        if not re.fullmatch(r"[!-~]*", os.environ.get(self.key, "")):  # valid in a header; the key itself is shown nowhere
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
    """Compare ways to prune: accuracy, visual tokens kept, cost. If --out holds an evaluation already, it is continued."""

    model: str = "scenes"
    """Folder or Hugging Face Hub id of the base model; scenes: the bundled model; scenes-plus: it, fine-tuned under pruning."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse; by default the model folder's own."""
    adapter: str | None = None
    """Folder or Hub id of a LoRA adapter in PEFT's files, which is used beside the weights."""
    tasks: tuple[str, ...] = ("scenes",)
    """Tasks: scenes, scenes:SPLIT (val, test, test_ood), scenes:SPLIT:400-576 (by visual tokens); viscot:PATH, a released Visual-CoT
    benchmark file or a folder of them; PATH of your own .jsonl or .json (the formats of gp-jax prepare); FOLDER or FOLDER:SPLIT that gp-jax
    prepare wrote, a task per data set."""
    images: str | None = None
    """Folder of the pictures that viscot: files and your own files refer to."""
    boxes: Literal["auto", "pixel", "normalized", "0-1000"] = "auto"
    """Meaning of box numbers in your own files, as for gp-jax prepare: auto, pixel, normalized or 0-1000."""
    plans: tuple[str, ...] = DEFAULT
    """Pruning plans: dense, glimpse, glimpse-PERCENT, glimpse-fixed-PERCENT, glimpse-above-PERCENT, oracle, nothing, random-SEED-PERCENT,
    NAME-PERCENT; look, look-oracle, look-random and look-first, with settings (look-share6.25-above10, docs/looks.md); plans that keep as
    many visual tokens of every sample as the glimpse: random, random-SEED, attention, fastv, pyramiddrop, visionzip, divprune, cdpruner,
    vscan, downsample; as many in total, with one share for all samples: NAME-pooled."""
    metrics: tuple[str, ...] = ()
    """Metrics: exact_match, vqa_accuracy, anls, token_f1, judge; tables show the first. [default: by data set, see docs/evaluation.md]"""
    prompt: Literal["free", "brief"] = "free"
    """free: the question alone; brief: the question and "Answer the question using a single word or phrase."."""
    limit: int = 600
    """Most records per task."""
    start: int = 0
    """Number of the first record of generated tasks."""
    scenes_seed: int = 0
    """Seed of generated tasks; another seed gives other scenes of the same kind."""
    suffix: str = ""
    """Text after every question, on a line of its own, instead of the text of --prompt."""
    max_new_tokens: int = 24
    """Length limit of answers, in tokens. The released free-form evaluation has 1024."""
    batch: int = 8
    """Questions per batch."""
    dtype: str | None = None
    """Type of weights and activations: float32 or bfloat16. [default: as stored]"""
    out: str = "runs/eval"
    """Folder to write: predictions.jsonl, left_out.jsonl, table.md, .csv and .json, tables by family or task, and report/index.html."""
    report: str | None = None
    """Path of the report. [default: report/index.html in --out]"""
    cost: str | None = None
    """Also show what pruning saves at the sizes of real pictures: the JSON file that `python -m benchmarks.cost` wrote."""
    pictures: int = 60
    """Number of samples in the report's gallery."""
    title: str = "GlimpsePrune: accuracy against retention"
    """Title of the report."""
    compilation_cache: str | None = None
    """Folder of the cache of compiled programs. [default: JAX_COMPILATION_CACHE_DIR, else ~/.cache/gp_jax/compiled]"""
    judge: JudgeConfig = JudgeConfig()
    """Language model that scores answers where metrics name `judge`."""
    devices: int = 1
    """Number of devices of a process that share each batch; -1: all."""
    coordinator: str | None = None
    """host:port of the first of several processes that share the questions and --out; not needed where JAX detects them."""
    processes: int | None = None
    """Number of processes, with `coordinator`."""
    process: int | None = None
    """Number of this process, from 0, with `coordinator`."""

    def check(self) -> "EvalConfig":
        """Checks everything that can be checked before anything is loaded. Returns: self. Raises: GlimpseError that names the field."""
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
        if self.cost is not None and kind_of(path_of(self.cost)) != "file":
            raise GlimpseError(f"cost={self.cost!r} is not a file; python -m benchmarks.cost --out {self.cost} writes it")
        for place in (self.out, self.report):
            if place is not None:
                kind_of(path_of(place))
        self.judge.check()
        return self

    @property
    def ending(self) -> str:
        """The text after every question, without the line break before it; empty: there is none."""
        return self.suffix or (BRIEF if self.prompt == "brief" else "")

    @property
    def settings(self) -> dict:
        """The fields that predictions depend on."""
        fields = ("model", "glimpse", "adapter", "start", "max_new_tokens", "dtype")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in fields} | {"suffix": self.ending}

    def identity(self) -> dict:
        """Everything that must be equal for saved predictions to be reused: settings, digests of all files of model, glimpse and
        adapter that affect an answer, and versions of the packages that read them."""
        from importlib.metadata import version

        from gp_jax.pretrained.adapters import ADAPTER_FILES  # slow to import
        from gp_jax.pretrained.checkpoint import ALL_FILES
        from gp_jax.pretrained.files import find_folder, parts_of
        from gp_jax.pretrained.identity import folder_identity

        files: dict[str, str] = {}
        names = parts_of(self.model, self.glimpse, self.adapter)
        for part, name, patterns in zip(("model", "glimpse", "adapter"), names, (ALL_FILES, ALL_FILES, ADAPTER_FILES), strict=True):
            if name:
                files |= {f"{part}/{file}": digest for file, digest in folder_identity(find_folder(name, patterns)).items()}
        return self.settings | {"gp_jax": __version__, "transformers": version("transformers"), "files": files}
