"""What does every stage cost, dense and pruned? python -m benchmarks.flops [--model 7b] [--visual-tokens 4096] [--retention 0.074]

FLOPs of products and bytes that must move (gp_jax/flops.py), from sizes alone: no weights, and no program runs. --check compiles the
stages of a small model and prints XLA's own count beside: --model scenes --visual-tokens 512 --check.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from gp_jax.errors import GlimpseError

if TYPE_CHECKING:
    from gp_jax.config.model import GlimpseConfig, ModelConfig
    from gp_jax.flops import Cost, Cuts, Workload

CHECK_WIDTH, CHECK_TOKENS = 1024, 640  # beyond: minutes of compilation, and attention in a loop, whose body XLA counts once


@dataclasses.dataclass(frozen=True)
class Args:
    """FLOPs and bytes by stage."""

    model: str = "7b"
    """3b, 7b, 32b or 72b (Qwen2.5-VL), scenes (the benchmark's small model), or a folder with a config.json."""
    visual_tokens: int = 4096
    """Visual tokens of a sample, one image of full windows."""
    text_tokens: int = 64
    """Other tokens of the prompt."""
    retention: float = 0.074
    """Share of the visual tokens that the cut keeps."""
    after: int | None = None
    """Cut after this layer, counted from 0. [default: the glimpse's own in a folder that has one, else two thirds of the depth]"""
    new_tokens: int = 128
    """Tokens of the answer."""
    batch: int = 1
    """Samples."""
    glimpse: bool = True
    """Glimpse rows and predictor choose what stays; otherwise nothing is counted for choosing."""
    triangle: bool = False
    """Count causal attention over what a row sees; otherwise over the full square."""
    padded: bool = False
    """Count the buckets that the engine pads to."""
    look_share: float = 0.25
    """Two looks: share of the visual tokens that the first look has."""
    seen: float = 0.25
    """Two looks: share of the vision windows that the second look sees."""
    check: bool = False
    """Also compile the plan's stages for this machine and print XLA's count."""
    out: Path = Path("runs/bench/flops")
    """Folder of flops.json and flops.png."""


def model_named(name: str, after: int | None) -> tuple["ModelConfig", "GlimpseConfig"]:
    """A known size's, the scenes model's or a folder's configuration, with its own glimpse or one of the released proportions."""
    from gp_jax.pretrained import hf_config
    from gp_jax.pretrained.known import SIZES
    from gp_jax.scenes import architecture
    from gp_jax.training.build import glimpse_config
    from gp_jax.training.settings import GlimpseSettings

    path, released = Path(name).expanduser() / "config.json", {}
    if name.lower() in SIZES:
        config = SIZES[name.lower()]
    elif name == "scenes":
        config = hf_config.model_config(architecture.config({token: i for i, token in enumerate(architecture.SPECIAL)}))
    elif path.is_file():
        released = hf_config.read_config(path.parent)
        config = hf_config.model_config(released, {}, str(path))
    else:
        raise GlimpseError(f"--model {name}: is not {', '.join(SIZES)} or scenes and has no config.json")
    if after is None and "reduce_layer" in released:
        return config, hf_config.glimpse_config(released, config, str(path))
    return config, glimpse_config(GlimpseSettings(reduce_layer=after), config)


def xla(config: "ModelConfig", glimpse: "GlimpseConfig | None", work: "Workload", cuts: "Cuts") -> dict[str, tuple[int, float]]:
    """Compiles the pipeline's functions on shapes alone, attention "einsum", float32.

    Args: cuts: none or one, chosen by the glimpse where there is one. Returns: per program FLOPs counted here and by XLA. The one
    decode step is the first.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from gp_jax import pipeline
    from gp_jax.flops import stages
    from gp_jax.inference import sampling
    from gp_jax.inference.requests import sampling_settings
    from gp_jax.pretrained.params import abstract_model
    from gp_jax.processing.layout import vision_input
    from gp_jax.pruning.plan import needs_glimpse, tapped_layers
    from gp_jax.pruning.scorers.scorer import Cut
    from gp_jax.trees import KeepLimits, PromptInput

    work = dataclasses.replace(work, new_tokens=2)
    plan = tuple(Cut(after, "glimpse" if glimpse else "given") for after, _ in cuts)
    graph, state = nnx.split(abstract_model(config, glimpse, jnp.float32))
    ours, found, batch, depth = stages(config, glimpse, work, cuts), {}, work.batch, config.text.num_hidden_layers

    def program(names: tuple[str, ...], function, *args, **static):
        def call(state, *args):
            return function(nnx.merge(graph, state), *args, **static)

        if names:
            counted = jax.jit(call).lower(state, *args).compile().cost_analysis()["flops"]
            found[" + ".join(n for n in names if n in ours)] = sum(ours[n].flops for n in names if n in ours), counted
        return jax.eval_shape(call, state, *args)

    def ints(*shape: int, dtype: type = np.int32) -> np.ndarray:
        return np.zeros(shape, dtype)

    rows = glimpse.rows if plan and glimpse else 0
    shape, many = (batch, work.text + work.visual + rows), (batch, work.visual)
    prompt = PromptInput(
        ints(*shape), ints(config.position_axes, *shape), ints(*shape, dtype=bool), ints(*shape), ints(*shape), ints(batch)
    )
    vision = vision_input([], config, batch, work.visual)
    features = program(("vision", "merger"), pipeline.see, vision, implementation="einsum")
    stream, low = program((), pipeline.embed, prompt, features), 0
    look = {"taps": tapped_layers(plan, glimpse), "glimpse": needs_glimpse(plan)}
    for cut, (after, share) in zip(plan, cuts, strict=True):
        names = (f"layers {low}..{after}", "glimpse rows")
        stream, low = program(names, pipeline.run, stream, low=low, high=after + 1, implementation="einsum", **look), after + 1
        if glimpse:
            limits = KeepLimits(np.float32(0), *(ints(batch) for _ in range(4)), ints(*many, dtype=bool))
            program(("predictor",), lambda *args, cut=cut: pipeline.score(*args[:4], cut, *args[4:]), stream, vision, features, limits)
        kept = work.text + int(share * work.visual)
        stream = jax.eval_shape(lambda s, k, cut=cut, n=kept: pipeline.compact(s, k, cut, n), stream, ints(*shape, dtype=bool))
    stream = program((f"layers {low}..{depth - 1}",), pipeline.run, stream, low=low, high=depth, implementation="einsum")
    program(("head",), pipeline.head, stream)
    settings = sampling_settings(config, 0.0, 0, 1.0, 0, None, batch)
    first = program((), sampling.blank, settings, slots=1)
    program(("decode token",), pipeline.decode_step, stream.kv, first)
    return found


def beside(counted: dict[str, tuple[int, float]], rest: dict[str, int]) -> dict[str, tuple[int, int, float]]:
    """Per program: FLOPs of products, of everything else where that was counted, and by XLA. Args: of `xla` and `elementwise.besides`."""
    return {name: (here, sum(rest.get(part, 0) for part in name.split(" + ")), there) for name, (here, there) in counted.items()}


def table(dense: dict[str, "Cost"], plan: dict[str, "Cost"], layers: dict[str, "Cost"]) -> str:
    """A line per stage. layers: the dense model's, divided where the plan is."""
    scale, sign = (1e9, "G") if plan["total"].flops > 1e12 else (1e6, "M")
    heads = [f"dense {sign}FLOP", f"pruned {sign}FLOP", f"dense {sign}B", f"pruned {sign}B"]
    lines = [f"{'':<16}{heads[0]:>14}{heads[1]:>14}{'ratio':>8}{heads[2]:>12}{heads[3]:>12}"]
    for name, cost in plan.items():
        base = dense.get(name) or layers.get(name)
        both = [f"{c.flops / scale:>14,.1f}" if c and c.flops else f"{'-':>14}" for c in (base, cost)]
        ratio = f"{cost.flops / base.flops:>8.1%}" if base and base.flops else f"{'-':>8}"
        sizes = [f"{c.bytes / scale:>12,.2f}" if c else f"{'-':>12}" for c in (base, cost)]
        lines.append(f"{name:<16}{''.join(both)}{ratio}{''.join(sizes)}")
    return "\n".join(lines)


def looks(args: Args, config: "ModelConfig", glimpse: "GlimpseConfig", ladders: object) -> str:
    """Vision and prefill with two looks, with one and dense, causal attention counted as tiled kernels do it."""
    from gp_jax.ahead.passes import Request, costs_of, passes

    sizes = dict(batch=args.batch, visual_tokens=args.visual_tokens, prompt_tokens=args.text_tokens, answer_tokens=args.new_tokens)
    request = Request(**sizes, retention=args.retention, look_share=args.look_share, seen=args.seen)
    work, reading = request.workload(config.vision, ladders), {}
    for name in ("look", "glimpse", "dense"):
        found = costs_of(config, glimpse, passes(name, request, config, glimpse, work), 2)
        reading[name] = sum(found[part].flops for part in ("vision", "merger", "decoder prefill"))
    look, one = (reading[name] / reading["dense"] for name in ("look", "glimpse"))
    said = f"first look at {args.look_share:.1%} of the visual tokens, second at {args.seen:.1%} of the windows"
    return f"vision and prefill: two looks {look:.1%} of dense, one look {one:.1%} ({said})"


def main(args: Args) -> None:
    """Prints, and writes."""
    from benchmarks.elementwise import besides
    from gp_jax.buckets import Ladders
    from gp_jax.flops import Workload, stages

    config, glimpse = model_named(args.model, args.after)
    ladders = Ladders() if args.padded else None
    size = (args.visual_tokens * config.vision.merge_unit, args.visual_tokens, args.text_tokens, args.new_tokens, args.batch)
    work, cuts = Workload(*size, ladders=ladders), ((glimpse.reduce_layer, args.retention),)
    ranker = glimpse if args.glimpse else None
    dense = stages(config, None, work, triangle=args.triangle)
    plan = stages(config, ranker, work, cuts, triangle=args.triangle)
    split = stages(config, None, work, [(glimpse.reduce_layer, 1.0)], triangle=args.triangle)
    print(f"{args.model}: {args.visual_tokens} visual + {args.text_tokens} text tokens, {args.retention:.1%} kept after layer {cuts[0][0]}")
    print(table(dense, plan, {name: cost for name, cost in split.items() if name.startswith("layers")}))
    print("\n" + looks(args, config, glimpse, ladders))
    found = {}
    if args.check:
        whole = config.vision.window_side**2
        if config.text.hidden_size > CHECK_WIDTH or args.visual_tokens > CHECK_TOKENS or args.visual_tokens % whole:
            raise GlimpseError(f"--check: at most {CHECK_WIDTH} wide and {CHECK_TOKENS} visual tokens, a multiple of {whole}")
        if args.triangle or args.padded:
            raise GlimpseError("--check: counts what runs, without --triangle and --padded")
        found = beside(xla(config, ranker, work, cuts), besides(config, ranker, work, cuts))
        print("\n" + f"{'MFLOP':<28}{'products':>12}{'the rest':>12}{'XLA':>12}{'ratio':>8}")
        for name, (products, rest, there) in found.items():
            print(f"{name:<28}{products / 1e6:>12,.2f}{rest / 1e6:>12,.2f}{there / 1e6:>12,.2f}{(products + rest) / there:>8.1%}")
    costs = {kind: {k: dataclasses.asdict(c) for k, c in own.items()} for kind, own in (("dense", dense), ("pruned", plan))}
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    args.out.mkdir(parents=True, exist_ok=True)
    hidden = args.out / ".flops.partial"
    hidden.write_text(json.dumps(settings | {"after": cuts[0][0]} | costs | {"xla": found}, indent=2) + "\n")
    hidden.replace(args.out / "flops.json")
    plot(args, dense, plan)


def plot(args: Args, dense: dict[str, "Cost"], plan: dict[str, "Cost"]) -> None:
    """FLOPs and bytes of every stage, dense and pruned, stacked."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from gp_jax.flops import SUMS

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(name for costs in (dense, plan) for name in costs if name not in SUMS))
    for axes, kind, scale, label in zip(both, ("flops", "bytes"), (1e12, 1e9), ("TFLOP", "GB"), strict=True):
        below = [0.0, 0.0]
        for number, name in enumerate(names):
            sizes = [getattr(costs[name], kind) / scale if name in costs else 0.0 for costs in (dense, plan)]
            axes.bar(["dense", "pruned"], sizes, bottom=below, label=name, color=pyplot.get_cmap("tab20")(number % 20))
            below = [a + b for a, b in zip(below, sizes, strict=True)]
        axes.set_ylabel(label)
    both[1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.suptitle(f"{args.model}: {args.visual_tokens} visual tokens, {args.retention:.1%} kept, {args.new_tokens} new tokens")
    figure.savefig(args.out / "flops.png", dpi=120)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except GlimpseError as error:
        sys.exit(f"error: {error}")
