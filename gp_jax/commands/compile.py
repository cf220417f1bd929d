"""The command `gp-jax compile`."""

import importlib.util
import os
import shutil
import sys
import threading
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO

import tyro

from gp_jax.errors import GlimpseError
from gp_jax.runtime import progress

if TYPE_CHECKING:
    from gp_jax.config.model import GlimpseConfig, ModelConfig

# These settings let the TPU compiler run without a TPU. Compiled programs are not cached: without a TPU they cannot be read again.
WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Compile:
    """Compile for a TPU on a machine without one, to know beforehand that programs fit its memory. Needs libtpu: pip install libtpu.

    gp-jax compile --model 7b --topology v5e:2x4 --batch 8 --visual-tokens 4096
    gp-jax compile --what train --model 7b --topology v5e:4x4 --batch 16 --visual-tokens 2048
    gp-jax compile --what plus --model 7b --topology v5e:4x4 --batch 4 --tensor 4
    gp-jax compile --what serve --model 7b --topology v5e:2x2 --kv-memory 16G --max-prompt 4096
    """

    what: Literal["generate", "train", "plus", "serve"] = "generate"
    """What to compile: the programs of generation; the training step of the glimpse with the released settings; a step of fine-tuning
    under pruning (the stage plus of train.py), rollout and update; or what gp-jax serve runs, with full caches."""
    model: str = ""
    """3b, 7b, 32b or 72b (Qwen2.5-VL), qwen3-vl-2b, -4b, -8b or -32b, llava-1.5-7b, llava-1.5-13b, or a model folder, of which only
    config.json is read."""
    topology: str = "v5e:4x4"
    """TPU generation (v4, v5e, v5p, v6e) and chips, e.g. v5e:1x1, v5e:2x4, v6e:4x4, v5p:2x2x4."""
    batch: int | None = None
    """Samples over all chips together. [default: 8; train, plus: 16 per micro-batch]"""
    visual_tokens: int | None = None
    """Visual tokens of a sample. [default: 4096, train, plus: 2048; LLaVA: those of its largest pictures]"""
    prompt_tokens: int = 64
    """Text tokens of a prompt."""
    answer_tokens: int | None = None
    """Tokens of an answer, plus: of a completion. [default: 128; train: 32]"""
    plan: Literal["glimpse", "look", "dense"] = "glimpse"
    """Generation: glimpse compiles the pruning programs and compares them with the dense ones; look does so with two looks; dense compiles
    only the dense ones. Plus: dense compiles a step in which nothing is cut."""
    look_share: float = 0.25
    """Generation, look: visual tokens of the first look, as a share."""
    seen: float = 0.25
    """Generation, look: share of the vision windows that the second look sees."""
    retention: float = 0.111
    """Generation, plus: share of the visual tokens that the cut keeps."""
    group: int = 8
    """Plus: completions of a question."""
    accumulation: int = 1
    """Plus: micro-batches of a step; all their questions are answered together."""
    beta: float = 0.0
    """Plus: weight of the KL term; 0: without its pass."""
    rank: int = 32
    """Plus: rank of the adapter, on all linear layers of the decoder."""
    all_layers: bool = False
    """Plus: compile the update for all layers, which takes hours and much memory; otherwise what it needs is computed from models of a few
    layers."""
    mesh: str = ""
    """Mesh, such as data=2,fsdp=1,tensor=4; -1: all that remain. [default: chosen for generation; train, plus: data=1,fsdp=-1,tensor=1]"""
    data: int | None = None
    """Mesh: number of copies of the model; samples are split over them."""
    fsdp: int | None = None
    """Mesh: devices over which stored parameters, and samples, are split."""
    tensor: int | None = None
    """Mesh: devices over which heads, MLPs and the vocabulary are split."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base model's weights."""
    remat: bool = True
    """Train, plus: recompute attention in the backward pass."""
    kv_memory: str = "8G"
    """Serve: memory for the caches of all rows, as of gp-jax serve."""
    max_prompt: int = 4096
    """Serve: longest prompt, in tokens with the visual ones."""
    max_rows: int = 16
    """Serve: most answers of one pool that are generated at once."""
    capacities: tuple[int, ...] = ()
    """Serve: rows of cache that a prompt may have, per pool, ascending. [default: as gp-jax serve chooses them]"""
    json: Path | None = None
    """Write the report as JSON to this file; -: to standard output, in place of the text."""

    def check(self) -> None:
        """Checks everything that can be checked before anything is compiled. Raises: GlimpseError."""
        from gp_jax.pretrained.known import SIZES

        if not self.model:
            raise GlimpseError(f"--model is missing: {', '.join(SIZES)} or a model folder")
        for name in ("batch", "visual_tokens", "prompt_tokens", "answer_tokens", "accumulation", "rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise GlimpseError(f"--{name.replace('_', '-')} {value} must be positive")
        for name in ("retention", "look_share", "seen"):
            if not 0 <= getattr(self, name) <= 1:
                raise GlimpseError(f"--{name.replace('_', '-')} {getattr(self, name)} is not in 0..1")
        if self.plan == "look" and self.what != "generate":
            raise GlimpseError("--plan look is of --what generate")
        if self.mesh and any(getattr(self, axis) is not None for axis in ("data", "fsdp", "tensor")):
            raise GlimpseError("--mesh cannot be combined with --data, --fsdp or --tensor")
        if self.json and str(self.json) != "-" and not self.json.parent.is_dir():
            raise GlimpseError(f"--json {self.json}: folder {self.json.parent} does not exist")

    def sizes(self) -> dict[str, int]:
        """The requested sizes of the mesh, by axis."""
        from gp_jax.ahead.topology import parse_mesh

        given = {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor") if getattr(self, axis) is not None}
        return parse_mesh(self.mesh) if self.mesh else given


def model_named(name: str) -> tuple["ModelConfig", "GlimpseConfig"]:
    """The configuration of a known size or a folder, with the folder's own glimpse or one of the released proportions."""
    from gp_jax.pretrained import hf_config
    from gp_jax.pretrained.known import SIZES
    from gp_jax.runtime.disk import kind_of, path_of, read_json
    from gp_jax.training.build import glimpse_config
    from gp_jax.training.settings import GlimpseSettings

    if name.lower() in SIZES:
        config = SIZES[name.lower()]
        return config, glimpse_config(GlimpseSettings(), config)
    path = path_of(name) / "config.json"
    if kind_of(path) != "file":
        raise GlimpseError(f"--model {name}: is not {', '.join(SIZES)} and has no config.json")
    released = hf_config.read_config(path.parent)
    config = hf_config.model_config(released, read_json(path.with_name("generation_config.json"), required=False), str(path))
    own = "reduce_layer" in released
    return config, hf_config.glimpse_config(released, config, str(path)) if own else glimpse_config(GlimpseSettings(), config)


def run(args: Compile) -> None:
    """Runs `gp-jax compile`."""
    if importlib.util.find_spec("libtpu") is None:
        raise GlimpseError('the TPU compiler is not installed: pip install libtpu (on a TPU VM: pip install "gp_jax[tpu]")')
    os.environ.update(WITHOUT_TPU)  # before JAX is imported
    args.check()
    sizes = args.sizes()
    from gp_jax.ahead.topology import generation_of

    generation_of(args.topology)
    model = model_named(args.model)
    with warnings.catch_warnings():
        warnings.showwarning = note
        {"generate": generate, "train": train, "plus": plus, "serve": serve}[args.what](args, *model, sizes)


def note(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Prints a warning as one line."""
    with ticking.lock:
        print(f"note: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def generate(args: Compile, config: "ModelConfig", glimpse: "GlimpseConfig", sizes: dict[str, int]) -> None:
    """Compiles the programs of generation and reports them."""
    from gp_jax.ahead import report
    from gp_jax.ahead.generation import compile_generation
    from gp_jax.ahead.passes import Request

    given = {f.name: getattr(args, f.name) for f in fields(Request) if getattr(args, f.name) is not None}
    if args.visual_tokens is None and config.vision.most_tokens:
        given["visual_tokens"] = config.vision.most_tokens
    request, plans = (
        Request(**given),
        {"look": ("look", "glimpse", "dense"), "glimpse": ("glimpse", "dense"), "dense": ("dense",)}[args.plan],
    )
    found = compile_generation(config, glimpse, args.topology, request, plans=plans, sizes=sizes, dtype=args.dtype, watch=ticking)
    words = (found, request, args.model, args.topology, args.dtype)
    show(args, report.facts(*words), report.text(*words))
    if not found.fits:
        raise GlimpseError(f"{args.model} on {args.topology}: {report.verdict(found)}")


def train(args: Compile, config: "ModelConfig", glimpse: "GlimpseConfig", sizes: dict[str, int]) -> None:
    """Compiles the training step and reports it. The settings are the released ones, not those of the folder's glimpse."""
    from gp_jax.ahead.training import compile_training, facts, report

    options = lengths(args, config, 32) | {"dtype": args.dtype, "remat": args.remat}
    with ticking(f"the training step of {args.model} for {args.topology} (minutes)"):
        fit = compile_training(config, args.topology, **options, **training_mesh(sizes))
    show(args, facts(fit), report(fit))
    if not fit.fits:
        needs = f"needs {fit.total / 2**30:.2f} GiB of {fit.limit / 2**30:.2f} GiB per chip"
        raise GlimpseError(f"the training step of {args.model} on {args.topology} {needs}")


def plus(args: Compile, config: "ModelConfig", glimpse: "GlimpseConfig", sizes: dict[str, int]) -> None:
    """Compiles a step of the stage plus and reports it: masks are the records' own, cut where the glimpse cuts."""
    from gp_jax.ahead.plus import compile_plus
    from gp_jax.ahead.plus_fit import Questions, facts, report

    after = glimpse.reduce_layer if args.plan == "glimpse" else None
    given = lengths(args, config, 128) | {name: getattr(args, name) for name in ("retention", "group", "accumulation")}
    options = {name: getattr(args, name) for name in ("beta", "rank", "dtype", "remat", "all_layers")}
    fit = compile_plus(config, args.topology, Questions(**given, after=after), **options, **training_mesh(sizes), watch=ticking)
    show(args, facts(fit), report(fit))
    if not fit.fits:
        needs = f"needs {fit.total / 2**30:.2f} GiB of {fit.limit / 2**30:.2f} GiB per chip"
        raise GlimpseError(f"a step of the stage plus of {args.model} on {args.topology} {needs}")


def serve(args: Compile, config: "ModelConfig", glimpse: "GlimpseConfig", sizes: dict[str, int]) -> None:
    """Compiles what a server runs and reports it."""
    from gp_jax.ahead.serving import compile_serving, facts, report, verdict
    from gp_jax.serving.settings import ServerSettings

    given: dict[str, Any] = {name: getattr(args, name) for name in ("kv_memory", "max_prompt", "max_rows", "capacities", "dtype")}
    settings = ServerSettings(args.model, max_new_tokens=args.answer_tokens or 256, **given)
    fit = compile_serving(config, glimpse, args.topology, settings, sizes=sizes, watch=ticking)
    show(args, facts(fit, settings, args.topology), report(fit, settings, args.topology))
    if not fit.fits:
        raise GlimpseError(f"{args.model} served on {args.topology}: {verdict(fit)}")


def lengths(args: Compile, config: "ModelConfig", answer: int) -> dict[str, Any]:
    """Sizes of a micro-batch of training. answer: tokens, where none are given."""
    visual_tokens = args.visual_tokens or config.vision.most_tokens or 2048
    given = {"batch": args.batch or 16, "visual_tokens": visual_tokens, "answer_tokens": args.answer_tokens or answer}
    return given | {"prompt_tokens": args.prompt_tokens}


def training_mesh(sizes: dict[str, int]) -> dict[str, Any]:
    """The requested sizes of the mesh and, for the other axes, those of `train.py`."""
    return {"data": 1, "fsdp": -1 if -1 not in sizes.values() else 1, "tensor": 1} | sizes


def show(args: Compile, facts: dict, text: str) -> None:
    """Prints the report and writes it to --json."""
    import json

    from gp_jax.runtime.disk import write_text

    line = json.dumps(facts, indent=2)
    print(line if str(args.json) == "-" else text)
    if args.json and str(args.json) != "-":
        write_text(args.json, line + "\n")


class ticking:
    """Prints what is being compiled and for how long, on standard error, because the compiler does not report progress."""

    running: ClassVar[dict[str, float]] = {}  # name -> start time; several threads compile
    lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, what: str):
        self.what, self.done, self.live = what, threading.Event(), sys.stderr.isatty()
        self.work = progress.Work(lambda seconds: progress.note(f"compiling {what} ... {seconds:.0f} s"))

    def __enter__(self) -> None:
        self.start = self.running[self.what] = time.monotonic()
        if self.live:
            threading.Thread(target=self._tick, daemon=True).start()
        else:
            progress.HEART.add(self.work)

    def _tick(self) -> None:
        while not self.done.wait(0.5):
            with self.lock:
                now = ", ".join(f"{what} {time.monotonic() - since:.0f} s" for what, since in list(self.running.items()))
                print(f"\r\x1b[Kcompiling {now}"[: shutil.get_terminal_size().columns + 3], end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        progress.HEART.remove(self.work)
        self.running.pop(self.what, None)
        with self.lock:
            clear = "\r\x1b[K" if self.live else ""
            print(f"{clear}compiled {self.what} in {time.monotonic() - self.start:.1f} s", file=sys.stderr, flush=True)


def parse(argv: list[str]) -> Compile:
    """Reads the command line."""
    return tyro.cli(Compile, args=argv, prog="gp-jax compile", config=(tyro.conf.HelptextFromCommentsOff,))
