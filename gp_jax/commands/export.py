"""The command `gp-jax export`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gp_jax.errors import GlimpseError

if TYPE_CHECKING:
    from gp_jax.config.model import GlimpseConfig
    from gp_jax.pruning.rule import Prune

PLATFORMS = ("cpu", "tpu", "cuda")
NOT_FIXED = ("oracle", "downsample")  # plans that need more than a picture and a question


@dataclass(frozen=True)
class Export:
    """Write a model as one program that runs without gp_jax: a jax.export artifact, its parameters (orbax) and a README.

    gp-jax export MODEL --to DIR --platforms cpu,tpu,cuda

    The program takes pixels and a prompt in fixed sizes and returns the tokens of `generate` (greedy), the keep mask and the importance
    map. DIR/README.md has the ten lines that load and call it with jax and orbax alone, and explains how to make your own inputs:
    gp_jax.artifact_inputs(DIR, picture, question), a dict of arrays for np.savez.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder or Hugging Face Hub id of the base model."""
    to: Path | None = None
    """Folder to write; an earlier export in it is replaced."""
    platforms: str = "cpu,tpu,cuda"
    """Platforms that the program must run on."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse; by default the model folder's own, if it has one."""
    plan: str | None = None
    """Pruning plan: dense, glimpse, glimpse-11.1 (keeps at most 11.1 %), glimpse-fixed-11.1 (exactly 11.1 %), nothing, look (two looks, its
    settings as for eval.py), or attention-11.1, fastv-11.1, pyramiddrop-, visionzip-, divprune-, cdpruner-, vscan-11.1. [default: glimpse
    if there is one, else dense]"""
    batch: int = 1
    """Samples per call; smaller batches are padded."""
    visual_tokens: tuple[int, ...] = ()
    """Most visual tokens of a sample. Of several sizes the program uses the smallest one that is enough. [default: 1024; LLaVA: that of
    its largest pictures]"""
    prompt_length: tuple[int, ...] = ()
    """Most rows of a prompt, visual tokens and glimpse included; one or several sizes. [default: the visual tokens and 128]"""
    kept: tuple[int, ...] = ()
    """Sizes for the rows that remain after a cut; the program uses the smallest that is enough. [default: some fractions of the prompt]"""
    max_new_tokens: int = 128
    """Length limit of the answer, in tokens."""
    dtype: str | None = None
    """Weights and activations: float32 or bfloat16. [default: as stored]"""
    attention: Literal["auto", "xla"] = "auto"
    """Attention. auto: the splash kernel on TPU; xla: no kernel, for programs that several TPU chips share."""
    image: Path | None = None
    """Picture of the example. [default: a drawn one]"""
    shrink: bool = True
    """Scale the example's picture down if it has too many visual tokens for the program; otherwise that is an error."""
    question: str = "What is there?"
    """Question of the example."""
    example: bool = True
    """Answer the example here and check that the program's tokens are those of `generate`."""

    def check(self) -> tuple[str, ...]:
        """Checks everything that can be checked before anything is loaded. Returns: the platforms. Raises: GlimpseError."""
        if self.to is None:
            raise GlimpseError("--to is missing: the folder to write")
        platforms = tuple(dict.fromkeys(name.strip() for name in self.platforms.split(",")))
        for name in platforms:
            if name not in PLATFORMS:
                raise GlimpseError(f"--platforms: '{name}' is not one of {', '.join(PLATFORMS)}")
        for name in ("batch", "max_new_tokens", "visual_tokens", "prompt_length", "kept"):
            value = getattr(self, name)
            sizes = value if isinstance(value, tuple) else (value,)
            if any(size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
                raise GlimpseError(f"--{name.replace('_', '-')} {' '.join(map(str, sizes))} must be positive and different")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise GlimpseError(f"--dtype {self.dtype} is not float32, bfloat16 or float16")
        if not self.question.strip():
            raise GlimpseError("--question is empty")
        from gp_jax.buckets import Ladders

        if self.example and self.max_new_tokens > (most := Ladders().decode.rungs[-1]):
            raise GlimpseError(
                f"--max-new-tokens {self.max_new_tokens}: the example is checked with generate, which makes {most} (or --no-example)"
            )
        return platforms


def named_plan(name: str | None, glimpse: "GlimpseConfig | None") -> "tuple[str, Prune | None]":
    """The plan's name and its keep rule. Raises: GlimpseError when the plan needs more than a picture and a question."""
    from gp_jax.evaluation.plans import make_plan

    name = name or ("glimpse" if glimpse else "dense")
    try:
        plan = make_plan(name, glimpse)
    except GlimpseError as error:
        raise GlimpseError(f"--plan: {error}") from error
    if plan.name.partition("-")[0] in NOT_FIXED or plan.name.startswith(("look-oracle", "look-first")):
        raise GlimpseError(f"--plan {name}: needs more than a picture and a question")
    if plan.matched:
        raise GlimpseError(f"--plan {name}: say how much to keep, in percent (attention-11.1, fastv-11.1, ...)")
    return name, plan.rule([], plan.ratio)


def run(args: Export) -> None:
    """Runs `gp-jax export`."""
    platforms = args.check()
    assert args.to is not None, "checked"
    from gp_jax.processing.images import open_image  # quick to import; the picture is checked before the model is loaded

    picture = open_image(args.image) if args.image else None
    from tqdm import tqdm

    from gp_jax.ahead.artifact.write import STEPS, ExportSettings, check_target, export
    from gp_jax.inference.function import inference_buckets
    from gp_jax.inference.requests import resolve
    from gp_jax.tiny import picture as draw
    from gp_jax.vlm import GlimpseVLM

    check_target(args.to)
    vlm = GlimpseVLM.from_pretrained(args.model, glimpse=args.glimpse, dtype=args.dtype, progress=True)
    name, prune = named_plan(args.plan, vlm.glimpse_config)
    plan, _ = resolve(prune, vlm.glimpse_config, vlm.config.text.num_hidden_layers)
    most = vlm.config.vision.most_tokens
    visual_tokens = args.visual_tokens or (most or 1024,)
    if most and max(visual_tokens) < most:
        raise GlimpseError(f"--visual-tokens {max(visual_tokens)}: this model's pictures have up to {most}, which nothing can change")
    prompt, kept, cuts = args.prompt_length, args.kept, len(plan)
    look = prune is not None and prune.look is not None
    buckets = inference_buckets(vlm.config, batch=args.batch, visual_tokens=visual_tokens, prompt=prompt, kept=kept, cuts=cuts, look=look)
    program = ExportSettings(prune, buckets, args.max_new_tokens, platforms, args.attention, name, Path(args.model).name)
    example = (draw() if picture is None else picture, args.question) if args.example else None
    bar = tqdm(total=len(STEPS), bar_format="{desc} ({n}/{total}) {elapsed}", leave=False, disable=not sys.stderr.isatty())

    def tell(step: str) -> None:
        bar.update(STEPS.index(step) + 1 - bar.n)
        bar.set_description_str(step)
        if bar.disable:
            print(f"{step} ...", file=sys.stderr)

    done = export(vlm, program, args.to, example, args.shrink or not args.image, tell)
    bar.close()
    print(f"wrote {args.to}: {done['bytes'] / 1e6:.1f} MB for {', '.join(platforms)}, plan {name}")
    if done.get("equal") is not None:
        print(
            f"example        {'the tokens of generate' if done['equal'] else 'other tokens than generate, from rounding'}: {done['text']!r}"
        )
    print(f"how to call it {args.to / 'README.md'}")


def parse(argv: list[str]) -> Export:
    """Reads the command line."""
    return tyro.cli(Export, args=argv, prog="gp-jax export", config=(tyro.conf.HelptextFromCommentsOff,))
