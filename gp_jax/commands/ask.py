"""The command `gp-jax ask`."""

import dataclasses
import difflib
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import tyro

from gp_jax.config.files import read_config
from gp_jax.errors import GlimpseError, printable

if TYPE_CHECKING:
    from gp_jax.config.model import GlimpseConfig
    from gp_jax.inference.results import Answer
    from gp_jax.pruning.rule import Prune


STDIN = "standard input"


@dataclass(frozen=True)
class Ask:
    """Ask a question about one or several photographs.

    gp-jax ask PHOTO [PHOTO ...] "question" --model DIR_OR_ID [--glimpse DIR_OR_ID]

    What begins with a dash and is no option stands behind `--`: gp-jax ask PHOTO --model DIR_OR_ID -- "--what is this?"
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar='PHOTO [PHOTO ...] "question"')]
    """The photographs (files, addresses, or - for standard input), then the question."""
    model: str = ""
    """Folder or Hugging Face Hub id of the base model."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse; by default the model folder's own, if it has one."""
    adapter: str | None = None
    """Folder or Hub id of a LoRA adapter in PEFT's files, which is used beside the weights."""
    config: Path | None = None
    """Name of a configuration (gp-jax configs lists them), or a Python file whose `ask` dict sets defaults for these options."""
    max_remain_ratio: float | None = None
    """Keep at most this share of the visual tokens. [default: the glimpse's config]"""
    fixed_remain_ratio: float | None = None
    """Keep exactly this share of the visual tokens."""
    threshold: float | None = None
    """Keep visual tokens whose importance is above it. [default: the glimpse's config]"""
    min_remain_num: int | None = None
    """Keep at least this number of visual tokens. [default: the glimpse's config]"""
    look: bool = False
    """Look twice: a first look at few visual tokens chooses the parts of the photographs that are seen at all. For large ones."""
    look_share: float | None = None
    """Look: visual tokens of the first look, as a share of the photograph's. [default of these: see docs/looks.md]"""
    look_threshold: float | None = None
    """Look: see parts in which an importance of the first look is above it."""
    look_margin: int | None = None
    """Look: see their neighbours too, up to this number of vision windows away."""
    look_floor: float | None = None
    """Look: see at least this share."""
    look_cap: float | None = None
    """Look: if the first look would choose a larger share than this, see everything."""
    look_sure: float | None = None
    """Look: if the first look finds no importance of at least this, see everything."""
    prune: bool = True
    """Prune; --no-prune reads the whole picture."""
    max_new_tokens: int = 128
    """Length limit of the answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: off."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that make up this probability; 1: off."""
    seed: int = 0
    """Of the sampling."""
    dtype: str | None = None
    """Weights and activations: float32 or bfloat16. [default: as stored]"""
    overlay: Path | None = None
    """Write the picture with its kept regions shown."""
    max_image_pixels: int = 100_000_000
    """Refuse larger pictures before decoding them."""
    json: bool = False
    """Print one JSON object instead of text."""

    def check(self) -> None:
        """What can be wrong before anything is loaded."""
        if len(self.inputs) < 2:
            raise GlimpseError('give at least one photo and a question: gp-jax ask PHOTO "question" --model DIR_OR_ID')
        if not self.inputs[-1].strip():
            raise GlimpseError("the question is empty")
        if not self.model:
            raise GlimpseError("--model is missing: a folder or a Hugging Face Hub id")
        if self.inputs[:-1].count("-") > 1:
            raise GlimpseError("-: only one picture can come from standard input")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise GlimpseError(
                f"--threshold {self.threshold:g} is not in 0..1: visual tokens stay whose importance, between 0 and 1, is above it "
                "(most glimpses have 0.5)"
            )
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise GlimpseError(f"--dtype {self.dtype} is not float32, bfloat16 or float16")
        if self.overlay and self.overlay.is_dir():
            raise GlimpseError(f"--overlay {self.overlay}: is a folder")
        if self.overlay and not self.overlay.parent.is_dir():
            raise GlimpseError(f"--overlay {self.overlay}: folder {self.overlay.parent} does not exist")
        if self.overlay and self.overlay.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise GlimpseError(f"--overlay {self.overlay}: must end in .png, .jpg or .webp")


def run(args: Ask) -> None:
    """Runs `gp-jax ask`."""
    args.check()
    from gp_jax.processing.images import open_image  # photographs are checked before the model is loaded

    photos = [open_image(given(path), args.max_image_pixels, STDIN) for path in args.inputs[:-1]]
    from gp_jax.runtime.progress import Progress, waiting

    start = time.perf_counter()
    with waiting("loading libraries"):
        from gp_jax import GlimpseVLM
    loaded = time.perf_counter()
    vlm = GlimpseVLM.from_pretrained(args.model, glimpse=args.glimpse, adapter=args.adapter, dtype=args.dtype, progress=True)
    before = {"libraries": loaded - start, "loading": time.perf_counter() - loaded}
    prune = pruning(args, vlm.glimpse_config)
    live = not args.json and sys.stdout.isatty()
    shown, stages = "", ("processing", *(("look",) * args.look), "vision", "glimpse", "finish", "decode")
    bar = Progress(desc=stages[0], bar_format="{desc} ... {elapsed}", leave=False)

    def next_stage(ended: str) -> None:
        bar.set_description_str(stages[min(stages.index(ended) + 1, len(stages) - 1)])

    def show(text: str) -> None:
        nonlocal shown
        bar.close()
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    answer = vlm.answer(
        photos,
        args.inputs[-1],
        prune=prune,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        max_image_pixels=args.max_image_pixels,
        on_text=show if live else None,
        on_stage=next_stage,
    )
    bar.close()
    assert not isinstance(answer, list)  # one question has one answer
    report(args, answer, before, shown if live else "")
    if prune is None and args.prune and not args.json:
        print("no pruning: no glimpse was given (--glimpse) and the model folder has none")


def given(photo: str) -> str | IO[bytes]:
    """What a photo's name stands for: - is standard input. Raises: GlimpseError when nothing comes from there."""
    if photo != "-":
        return photo
    if sys.stdin is None or sys.stdin.isatty():
        raise GlimpseError('-: standard input is a terminal; send a picture to it: gp-jax ask - "question" --model DIR_OR_ID < PHOTO')
    return sys.stdin.buffer


def report(args: Ask, answer: "Answer", before: dict[str, float], shown: str) -> None:
    """Prints the answer (less what was shown while it grew) and its facts; writes the overlay. before: seconds of what came before it."""
    from gp_jax.runtime.clock import COMPILE, COMPILES

    timings = before | answer.timings
    if args.json:
        facts = {
            "answer": answer.text,
            "kept_tokens": answer.kept,
            "total_tokens": answer.total,
            "retention": answer.retention,
            "seen_share": answer.seen_share,
            "first_look_tokens": sum(rows * columns for rows, columns in answer.look.grids) if answer.look else 0,
            "generated_tokens": len(answer.tokens),
            "timings": {stage: round(seconds, 4) for stage, seconds in timings.items()},
            "programs": {"compiled": COMPILES.count - COMPILES.read, "read": COMPILES.read, "reading": round(COMPILES.reading, 4)},
            "overlay": str(args.overlay) if args.overlay else None,
        }
        print(json.dumps(facts, ensure_ascii=False))
        return save_overlay(answer, args.overlay)
    print(answer.text.removeprefix(shown))
    print(f"\nvisual tokens  {answer.kept} of {answer.total} kept ({answer.retention:.1%})")
    if args.look:
        looked = sum(rows * columns for rows, columns in answer.look.grids) if answer.look else 0
        said = f"chosen by a first look at {looked}" if looked else "no first look: it is small"
        print(f"picture seen   {answer.seen_share:.1%} of the visual tokens, {said}")
    left_out = (COMPILE,) if args.look else (COMPILE, "look")
    print("seconds        " + "  ".join(f"{stage} {seconds:.3f}" for stage, seconds in answer.timings.items() if stage not in left_out))
    first, reading = answer.timings[COMPILE], COMPILES.reading
    made = f"{max(0.0, first - reading):.1f} s to trace and compile {COMPILES.count - COMPILES.read} programs"
    print(
        f"first call     {made}, {reading:.1f} s to read {COMPILES.read} kept ones; not in the seconds above, later answers are without it"
    )
    print(f"before it      {before['libraries']:.1f} s to load libraries, {before['loading']:.1f} s to load the model")
    save_overlay(answer, args.overlay)
    if args.overlay:
        print(f"overlay        {args.overlay}")
    return None


def pruning(args: Ask, glimpse: "GlimpseConfig | None") -> "Prune | None":
    """The keep rule: the glimpse's own, changed by what the command line says. Raises: GlimpseError when nothing can prune."""
    from gp_jax import Look, Prune

    given: dict[str, Any] = {"reduce_threshold": args.threshold, "max_remain_ratio": args.max_remain_ratio}
    given |= {"min_remain_num": args.min_remain_num, "fixed_remain_ratio": args.fixed_remain_ratio}
    given = {name: value for name, value in given.items() if value is not None}
    settings = {name: getattr(args, f"look_{name}") for name in ("share", "threshold", "margin", "floor", "cap", "sure")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings and not args.look:
        raise GlimpseError(f"--look-{next(iter(settings))} needs --look")
    given |= {"look": Look(**settings)} if args.look else {}
    if given and not (args.prune and glimpse):
        raise GlimpseError("options that prune need a glimpse (--glimpse)" if args.prune else "--no-prune excludes the options that prune")
    if not args.prune or glimpse is None:
        return None
    rule = Prune.from_config(glimpse)
    if given.keys() - {"look", "fixed_remain_ratio"} and "fixed_remain_ratio" not in given:
        rule = dataclasses.replace(rule, fixed_remain_ratio=None)  # it would silence them
    return dataclasses.replace(rule, **given)


def save_overlay(answer: "Answer", path: Path | None) -> None:
    """Writes the overlay, whole or not at all."""
    if path is None:
        return
    scratch = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        picture = answer.overlay()
        assert picture is not None  # `check` asks for a photo
        picture.save(scratch)
        scratch.replace(path)
    except (OSError, ValueError) as error:
        raise GlimpseError(f"--overlay {path}: cannot be written ({error})") from error
    finally:
        scratch.unlink(missing_ok=True)


def config_defaults(path: Path) -> dict:
    """The `ask` dict of a Python config file. Raises: GlimpseError when there is none or it has unknown fields."""
    values = read_config(path, "ask", (dict,))
    known = {f.name for f in dataclasses.fields(Ask)} - {"inputs", "config"}
    if not set(values) <= known:
        raise GlimpseError(f"--config {path}: needs a dict `ask` with options of gp-jax ask ({', '.join(sorted(known))})")
    return values


def parse(argv: list[str]) -> Ask:
    """Reads the command line; a --config file changes the defaults. What stands behind `--` is a photo or the question, whatever it begins
    with. Raises: GlimpseError for an option that there is not.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    words, behind = argv[:end], tuple(argv[end + 1 :])
    check_options(words)
    options: dict[str, Any] = dict(args=words, prog="gp-jax ask", config=(tyro.conf.HelptextFromCommentsOff,))
    args = tyro.cli(Ask, **options)
    if args.config is not None:
        args = tyro.cli(Ask, default=Ask(inputs=(), **config_defaults(args.config)), **options)
    return dataclasses.replace(args, inputs=args.inputs + behind)


def check_options(words: list[str]) -> None:
    """Raises: GlimpseError for a word that begins with a dash and is neither an option nor a number."""
    names = [f.name.replace("_", "-") for f in dataclasses.fields(Ask)]
    known = {"-h", "--help", *(f"--{name}" for name in names), *(f"--no-{name}" for name in names)}
    value = re.compile(r"[^-].*|-|-[\d.][\d.eE+-]*|", re.DOTALL)
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if value.fullmatch(word) or name in known or name.startswith("--tyro-"):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        shown = printable(word, 80)
        raise GlimpseError(f"{shown}: no such option{meant}; a question that begins with a dash stands behind --, at the end: -- {shown!r}")
