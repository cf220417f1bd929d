"""A step of the stage `plus`, against the same step in torch: python -m benchmarks.plus_step [--size mid] [--side 16] [--rounds 5]

Q questions x G completions of C tokens, sampled, then one AdamW update of LoRA on every linear layer of the decoder, float32. Contenders:
the stage's own code under reference masks (pruned) and with all visual tokens (dense); transformers and PEFT on the same weights and
pictures, as they come (torch) and at their best: the tower once per picture, gp_jax's settings of the allocator (torch, tuned). Each is a
process of its own, asked in turns. No completion ends early: the checkpoint has no end token. Data are loaded before the clock starts, as
both load them in the background. Needs torch (`pip install ".[test]"`) and PEFT (`pip install peft`); --no-torch needs neither.
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import random_model
from benchmarks.contenders import Contender, interleave
from benchmarks.plus_report import report
from gp_jax.errors import GlimpseError
from gp_jax.runtime.allocator import TUNABLES

AGREEMENT = 1e-4  # nats, of a token's log-probability at the start
MISSING = "PEFT is not installed, so torch takes no part: pip install peft, or say --no-torch"


@dataclass(frozen=True)
class Args:
    """Compare a step of reinforcement fine-tuning."""

    size: Literal["large", "mid", "small"] = "mid"
    """Of the model: 0.5 B parameters, 40 M, or a tiny one of 1 M."""
    side: int = 16
    """Of the pictures, in visual tokens: 16 is 448 x 448 pixels, 256 visual tokens."""
    questions: int = 4
    """Of a step, Q."""
    group: int = 8
    """Completions of a question, G."""
    new_tokens: int = 32
    """Of a completion, C."""
    retention: float = 0.1
    """Share of the visual tokens that the masks keep."""
    micro: int = 1
    """Questions of a micro-batch of the update."""
    beta: float = 0.0
    """Weight of the KL term; above 0 the reference model is evaluated too."""
    rank: int = 32
    """Of the adapter."""
    remat: bool = True
    """Recompute what lies between matrix products, as the stage does unless told otherwise (gp_jax only)."""
    rounds: int = 5
    """Timed steps of each contender; medians count."""
    torch: bool = True
    """Whether torch takes part."""
    out: Path = Path("runs/bench/plus_step")
    """Folder of plus_step.json."""

    def check(self) -> "Args":
        """Returns: self. Raises: GlimpseError."""
        if self.questions % self.micro:
            raise GlimpseError(f"questions={self.questions} must be a multiple of micro={self.micro}")
        return self

    @property
    def kept(self) -> int:
        """Visual tokens of a picture that stay."""
        return max(1, round(self.retention * self.side**2))


def write_data(folder: Path, args: Args) -> None:
    """Pictures with questions of one length, and boxes that touch exactly the tokens that are kept; prepared, and completions to compare
    log-probabilities on."""
    import numpy as np
    from PIL import Image

    from gp_jax.data.prepare import prepare

    random, side = np.random.default_rng(0), args.side
    whole, rest = divmod(args.kept, side)
    boxes = [(0, 0, side, whole)] if whole else []
    boxes += [(0, whole, rest, whole + 1)] if rest else []
    inside = [[28 * x1 + 7, 28 * y1 + 7, 28 * x2 - 7, 28 * y2 - 7] for x1, y1, x2, y2 in boxes]
    rows = []
    (folder / "pictures").mkdir()
    for number in range(args.questions):
        pixels = random.integers(0, 256, (28 * side, 28 * side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        row = {"image": f"{number}.png", "question": f"What does sign {number:03} say?", "answer": "stop"}
        rows.append(row | {"boxes": inside, "box_format": "pixel", "split": "train"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([folder / "rows.jsonl"], folder / "pictures", folder / "data", workers=1, progress=False)
    words = random.integers(0, 256, (args.questions * args.group, args.new_tokens))
    np.save(folder / "completions.npy", words.astype(np.int32))


def write(folder: Path, args: Args) -> None:
    """Model, data and settings of a run."""
    print("writing a random model", file=sys.stderr)
    random_model.write(folder / "model", args.size)
    generation = folder / "model" / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": -1}))  # nothing ends early
    write_data(folder, args)
    (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), default=str))


def contenders(folder: Path, args: Args) -> tuple[list[Contender], dict[str, float]]:
    """Starts everybody. Returns: contenders, and seconds of the first step of those that had to compile."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    field, first = [], {}
    for name, masks in (("pruned", "reference"), ("dense", "none")):
        print(f"starting {name}", file=sys.stderr)
        command = (name, "benchmarks.plus_contenders", "ours", folder, masks)
        cold = Contender(*command, **cache)
        first[name] = cold.ready["first"]
        cold.end()
        field.append(Contender(*command, **cache))  # finds compiled programs, so what compiling needs is not in its memory
    if args.torch and importlib.util.find_spec("peft") is None:
        print(MISSING, file=sys.stderr)
    elif args.torch:
        for name, once, environment in (("torch", 0, {}), ("torch, tuned", 1, {"GLIBC_TUNABLES": TUNABLES})):
            print(f"starting {name}", file=sys.stderr)
            field.append(Contender(name, "benchmarks.plus_contenders", "torch", folder, once, **environment))
    return field, first


def main(args: Args) -> int:
    """Runs it. Returns: exit status, 1 when gp_jax and torch do not compute the same log-probabilities."""
    from gp_jax.runtime.progress import Progress

    args.check()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, args)
        field, first = contenders(folder, args)
        with Progress(total=len(field) * (args.rounds + 1), unit="step") as bar:
            interleave(field, args.rounds, progress=lambda name: (bar.set_description(name), bar.update()))
        ends = {contender.name: contender.end() for contender in field}
    report(args, field, ends, first)
    means = {c.name: c.ready["logprob"] for c in field if c.name != "pruned"}
    if max(means.values()) - min(means.values()) > AGREEMENT:
        print(f"log-probabilities of the same tokens differ: {means}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.plus_step")))
    except GlimpseError as error:
        sys.exit(f"benchmarks.plus_step: {error}")
