"""The command `gp-jax compile`."""

import dataclasses
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from gp_jax.errors import GlimpseError

if TYPE_CHECKING:
    from gp_jax.config import ModelConfig

# The TPU compiler runs without a TPU when told not to look for one.
WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Compile:
    """Compile for a TPU that is not here, to know beforehand that a program fits its memory. Needs libtpu: pip install libtpu.

    gp-jax compile --train --model 7b --topology v5e:4x4 --batch 16 --visual-tokens 2048
    """

    train: bool = False
    """The training step, with the released settings."""
    model: str = ""
    """3b or 7b (Qwen2.5-VL), llava-1.5-7b, llava-1.5-13b, or a model folder, of which only config.json is read."""
    topology: str = "v5e:4x4"
    """TPU generation and chips, e.g. v5e:2x2, v5e:4x4, v6e:4x4, v5p:2x2x2."""
    batch: int = 16
    """Samples of a micro-batch, over all chips."""
    visual_tokens: int = 2048
    """Visual tokens of a sample."""
    prompt_tokens: int = 64
    """Text tokens of a prompt."""
    answer_tokens: int = 32
    """Tokens of an answer."""
    data: int = 1
    """Mesh: copies of the model; samples are split over them."""
    fsdp: int = -1
    """Mesh: the model's parts at rest, and samples, are split over these; -1: all that is left."""
    tensor: int = 1
    """Mesh: heads, MLPs and vocabulary are split over these."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen base."""
    remat: bool = True
    """Compute attention again in the backward pass."""
    json: bool = False
    """Print one JSON object instead of text."""

    def check(self) -> None:
        """What can be wrong before anything is compiled."""
        if not self.train:
            raise GlimpseError("say what to compile: --train")
        if not self.model:
            raise GlimpseError("--model is missing: 3b, 7b, llava-1.5-7b, llava-1.5-13b or a model folder")
        for name in ("batch", "visual_tokens", "prompt_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise GlimpseError(f"--{name.replace('_', '-')} {getattr(self, name)} must be positive")


def model_named(name: str) -> "ModelConfig":
    """A known size or a folder's config."""
    from gp_jax.pretrained.files import read_json
    from gp_jax.pretrained.hf_config import model_config, read_config
    from gp_jax.pretrained.known import KNOWN

    if name.lower() in KNOWN:
        return KNOWN[name.lower()]
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        raise GlimpseError(f"--model {name}: is not {', '.join(KNOWN)} and has no config.json")
    generation = read_json(path.with_name("generation_config.json"), required=False)
    return model_config(read_config(path.parent), generation, str(path))


def run(args: Compile) -> None:
    """Runs `gp-jax compile`."""
    args.check()
    os.environ.update(WITHOUT_TPU)
    config = model_named(args.model)
    from gp_jax.training.ahead import compile_training, report

    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in ("train", "model", "topology", "json")}
    with ticking(f"compiling the training step of {args.model} for {args.topology}"):
        fit = compile_training(config, args.topology, **options)
    if args.json:
        import json

        print(json.dumps(dataclasses.asdict(fit) | {"fits": fit.fits}))
    else:
        print(report(fit))
    if fit.fits is False:
        raise GlimpseError(f"the training step does not fit {args.topology}")


class ticking:
    """Seconds on the terminal while something that cannot tell its progress runs."""

    def __init__(self, what: str):
        self.what, self.done = what, threading.Event()

    def __enter__(self) -> None:
        self.start = time.monotonic()
        self.thread = threading.Thread(target=self._tick, daemon=True)
        if sys.stderr.isatty():
            self.thread.start()
        else:
            print(f"{self.what} (minutes)", file=sys.stderr)

    def _tick(self) -> None:
        while not self.done.wait(1):
            print(f"\r{self.what} ... {time.monotonic() - self.start:.0f} s", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()


def parse(argv: list[str]) -> Compile:
    """Reads the command line."""
    return tyro.cli(Compile, args=argv, prog="gp-jax compile", config=(tyro.conf.HelptextFromCommentsOff,))
