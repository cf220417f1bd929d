"""What `benchmarks.plus_step` prints and writes: seconds, completions per second, memory, and the FLOPs that sizes give."""

import dataclasses
import json
import os
from typing import TYPE_CHECKING

from benchmarks.contenders import Contender
from benchmarks.random_model import hf_config
from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.flops import Workload, stages
from gp_jax.models.adapter import LINEAR
from gp_jax.pretrained.hf_config import glimpse_config, model_config

if TYPE_CHECKING:
    from benchmarks.plus_step import Args

STAGES = ("rollout", "update", "step", "logprobs")
TIMES = (*STAGES, "cpu")  # of the processor in a step, which other work on the machine changes less


def read(args: "Args") -> tuple[ModelConfig, GlimpseConfig]:
    """The model of a run."""
    config = model_config(hf_config(args.size), {})
    return config, glimpse_config(hf_config(args.size), config)


def linear_sizes(config: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of a decoder layer."""
    text = config.text
    query, key = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    width, inner = text.hidden_size, text.intermediate_size
    return [(width, query), (width, key), (width, key), (query, width), (width, inner), (width, inner), (inner, width)][: len(LINEAR)]


def attention_flops(config: ModelConfig, pairs: int) -> int:
    """Of pairs of a query and a key."""
    return 4 * pairs * config.text.num_attention_heads * config.text.head_dim


def step_flops(args: "Args", text: int, pruned: bool, shared: bool = True, again: int = 0) -> dict[str, float]:
    """FLOPs of the stages of a step, from sizes alone: products of linear layers, attention and adapters; what remat computes again and
    padding are not counted.

    The backward pass of a frozen linear layer is one product, of attention and of an adapter two.
    Args: text: tokens of a prompt beside the visual ones; shared: a prompt is read once for its group, else once for every completion;
        again: how often every pass shows a picture to the tower again.
    """
    config, glimpse = read(args)
    depth, side, after = config.text.num_hidden_layers, args.side, glimpse.reduce_layer
    visual, (asked, rows) = side**2, (args.questions, args.questions * args.group)
    prompts = asked if shared else rows
    cuts = ((after, args.kept / visual),) if pruned else ()
    work = Workload(visual * config.vision.merge_unit, visual, text, args.new_tokens, prompts, ((side, side),) * 1)
    reading = stages(config, None, work, cuts, itemsize=4)
    behind = stages(config, None, dataclasses.replace(work, batch=rows), cuts, itemsize=4)
    tower = stages(config, None, dataclasses.replace(work, batch=asked), cuts, itemsize=4)
    vision = (tower["vision"] + tower["merger"]).flops

    short, fed = (args.kept if pruned else visual) + text, args.new_tokens - 1
    lengths = [visual + text if layer <= after else short for layer in range(depth)]
    seen = sum(prompts * n * n + rows * fed * short + rows * fed * (fed + 1) // 2 for n in lengths)
    adapter = sum(2 * args.rank * (a + b) for a, b in linear_sizes(config)) * sum(prompts * n + rows * fed for n in lengths)
    forward = reading["decoder prefill"].flops + behind["decode"].flops + adapter
    backward = forward + attention_flops(config, seen) + adapter
    rollout, logprobs = vision + forward, (forward + again * vision) * (1 + bool(args.beta))
    update = logprobs + backward
    return dict(rollout=rollout, update=update, step=rollout + update, logprobs=logprobs)


def report(args: "Args", field: list[Contender], ends: dict[str, dict], first: dict[str, float]) -> None:
    """Prints the table and writes plus_step.json."""
    named = {c.name: c for c in field}
    text = round(named["pruned"].ready["text"])
    ways = {"pruned": (True, True, 0), "dense": (False, True, 0), "torch": (False, False, args.group), "torch, tuned": (False, False, 0)}
    flops = {name: step_flops(args, text, *ways[name]) for name in named}
    visual, rows = args.side**2, args.questions * args.group
    print(
        f"\n{args.size}: {args.questions} questions x {args.group} completions of {args.new_tokens} tokens, {visual} visual + {text} text "
        f"tokens, {args.kept} kept ({args.kept / visual:.1%}), rank {args.rank}, beta {args.beta:g}, float32"
    )
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {args.rounds} interleaved rounds, medians")
    print(f"{'':16}" + "".join(f"{stage + ' s':>12}" for stage in TIMES) + f"{'compl./s':>10}{'spread':>8}{'peak MiB':>10}{'TFLOP':>8}")
    for c in field:
        seconds = "".join(f"{c.median(stage):12.3f}" for stage in TIMES)
        rest = f"{rows / c.median('step'):10.2f}{c.spread('step'):8.1%}{ends[c.name]['peak']:10.0f}{flops[c.name]['step'] / 1e12:8.3f}"
        print(f"{c.name:16}{seconds}{rest}")
    print("logprobs: a pass without gradient; not part of a step, whose update makes its own")
    ratios: dict[str, dict[str, float]] = {}
    for one, other in (("pruned", "dense"), ("dense", "torch"), ("pruned", "torch"), ("dense", "torch, tuned"), ("pruned", "torch, tuned")):
        if one in named and other in named:
            times = {stage: named[one].median(stage) / named[other].median(stage) for stage in TIMES}
            memory, work = ends[one]["peak"] / ends[other]["peak"], {s: flops[one][s] / flops[other][s] for s in STAGES}
            ratios[f"{one} / {other}"] = times | dict(memory=memory) | {f"{stage} flops": share for stage, share in work.items()}
            shown = "   ".join(f"{stage} {times[stage]:.2f} (FLOPs {work[stage]:.2f})" for stage in STAGES)
            print(f"{one + ' / ' + other:22} {shown}   cpu {times['cpu']:.2f}   memory {memory:.2f}")
    for c in field:
        found = ", ".join(f"{name} {c.ready[name]:.1f} s" for name in ("load", "first"))
        compiled = f"; compiling first: {first[c.name]:.1f} s" if c.name in first else ""
        above = ends[c.name]["peak"] - c.ready["python"]
        print(f"{c.name:16}{found}{compiled}; {above:.0f} MiB above the {c.ready['python']:.0f} of Python and imports")
    args.out.mkdir(parents=True, exist_ok=True)
    found = {c.name: dict(ready=c.ready, steps=c.results, end=ends[c.name], flops=flops[c.name]) for c in field}
    settings = dataclasses.asdict(args) | dict(out=str(args.out))
    scratch = args.out / ".plus_step.partial"
    scratch.write_text(json.dumps(dict(settings=settings, contenders=found, ratios=ratios, compiling=first), indent=1))
    scratch.replace(args.out / "plus_step.json")
