"""What `benchmarks.generate` prints, writes and draws: times, ratios, and what memory, decoding and a first answer should cost at most."""

import json
from typing import TYPE_CHECKING

from benchmarks.contenders import Contender

if TYPE_CHECKING:
    from benchmarks.generate import Args

READING = ("processing", "look", "vision", "prefill")  # up to the first token
STAGES = (*READING, "decode")


def tokens_per(contender: Contender, args: "Args") -> float:
    """Milliseconds per generated token behind the first."""
    return 1e3 * contender.median("decode") / max(1, args.new_tokens - 1)


def report(args: "Args", field: list[Contender], ends: dict[str, dict], roofline: dict) -> None:
    """Prints the tables and writes generate.json and generate.png."""
    visual = args.side**2
    print(f"\n{visual} visual tokens, {args.new_tokens} new tokens, {args.retention:.1%} kept; {args.rounds} interleaved rounds, medians")
    if "look" in args.contenders:
        print(f"look: first at {args.look_share:.1%} of the visual tokens, then at {args.seen:.1%} of the windows")
    print(f"{'':24}" + "".join(f"{stage + ' s':>14}" for stage in (*STAGES, "total")) + f"{'ms/token':>10}{'spread':>8}{'peak MiB':>10}")
    for c in field:
        row = "".join(f"{c.median(stage):14.3f}" for stage in (*STAGES, "total"))
        print(f"{c.name:24}{row}{tokens_per(c, args):10.1f}{c.spread('total'):8.1%}{ends[c.name]['peak']:10.0f}")
        print(f"{'  spread':24}" + "".join(f"{c.spread(stage):14.1%}" for stage in (*STAGES, "total")))
    named, ratios = {c.name: c for c in field}, {}
    for dtype in args.dtypes:
        look, ours, dense, theirs = (named.get(f"{name} {dtype}") for name in ("look", "pruned", "dense", "transformers"))
        for title, one, other in (
            ("look / dense", look, dense),
            ("look / pruned", look, ours),
            ("pruned / dense", ours, dense),
            ("dense / transformers", dense, theirs),
            ("pruned / transformers", ours, theirs),
        ):
            if one and other:
                both = [stage for stage in (*STAGES, "first", "total") if other.median(stage)]
                ratios[f"{title} {dtype}"] = {stage: one.median(stage) / other.median(stage) for stage in both}
    for title, values in ratios.items():
        print(f"{title:32}" + "".join(f"{stage} {value:5.2f}   " for stage, value in values.items()))
    for dtype in args.dtypes:
        if f"pruned / dense {dtype}" in ratios:
            work = named[f"pruned {dtype}"].ready["flops"] / named[f"dense {dtype}"].ready["flops"]
            time_ratio = ratios[f"pruned / dense {dtype}"]["prefill"]
            ratios[f"pruned / dense {dtype}"]["prefill flops"] = work
            print(f"prefill {dtype}: pruned / dense {time_ratio:.3f} in time, {work:.3f} in FLOPs: {time_ratio / work:.2f} x")
    for dtype in args.dtypes:
        for title in ("look / dense", "look / pruned"):
            if found := ratios.get(f"{title} {dtype}"):
                one, other = (named[f"{name} {dtype}"].ready["reading_flops"] for name in title.split(" / "))
                found["reading flops"] = one / other
                more = found["first"] / found["reading flops"]
                print(f"first token {dtype}: {title} {found['first']:.3f} in time, {one / other:.3f} in FLOPs: {more:.2f} x")
    best = {
        name: min((named[f"{name} {d}"].median("total") for d in args.dtypes if f"{name} {d}" in named), default=None)
        for name in args.contenders
    }
    if best.get("pruned") and best.get("transformers"):
        print(f"best pruned is {best['transformers'] / best['pruned']:.2f} x as fast as the best transformers")
    print("roofline: " + ", ".join(f"{name} {value:.0f}" for name, value in roofline.items()))
    for c in field:
        if "token" in c.ready:
            bound = c.ready["token"] * 2**20 / (roofline["read GB/s"] * 1e9) * 1e3
            weights = f"a token reads {c.ready['token']:.0f} MiB of weights: {bound:.1f} ms at least, {tokens_per(c, args) / bound:.2f} x"
            lines = (weights, *memory(c.ready, ends[c.name]), start(c))
            print("\n".join(f"{name:24}{line}" for name, line in zip((c.name, "", "", ""), lines, strict=True)))
    args.out.mkdir(parents=True, exist_ok=True)
    found = {c.name: dict(ready=c.ready, requests=c.results, end=ends[c.name]) for c in field}
    scratch = args.out / ".generate.partial"
    scratch.write_text(json.dumps(dict(contenders=found, ratios=ratios, roofline=roofline), indent=1))
    scratch.replace(args.out / "generate.json")
    plot(args, field)


def memory(ready: dict, end: dict) -> tuple[str, str]:
    """The cache and the peak of one of ours, beside what they should be."""
    padding = 1 - end["cache_needed"] / end["cache"]
    bound = 1.25 * (ready["weights"] + ready["block"] + end["cache"])
    return (
        f"cache {end['cache']:.2f} MiB in arrays, {end['cache_needed']:.2f} without padding ({padding:.1%}), from sizes "
        f"{ready['cache_analytic']:.2f} ({end['cache_needed'] / ready['cache_analytic']:.3f} x)",
        f"peak {end['peak'] - ready['python']:.0f} MiB above the {ready['python']:.0f} of Python and JAX; weights + a block's activations "
        f"{ready['block']:.0f} + cache, and 25 %: {bound:.0f}",
    )


def start(c: Contender) -> str:
    """How long the first answer of a process takes that finds its programs compiled, beside twice a later one and reading weights."""
    ready = c.ready
    bound = 2 * (c.median("total") + ready["reading"])
    return (
        f"first answer {ready['load'] + ready['first']:.1f} s after the start, {ready['reading']:.1f} s of it reading weights "
        f"({ready['read']} programs read, {ready['compiled']} compiled); twice a later answer and reading: {bound:.1f}"
    )


def plot(args: "Args", field: list[Contender]) -> None:
    """Stacked seconds per stage."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(field) + 1.6), layout="constrained")
    left = [0.0] * len(field)
    for stage in STAGES:
        values = [c.median(stage) for c in field]
        axes.barh([c.name for c in field], values, left=left, label=stage)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds, {args.side**2} visual tokens, {args.new_tokens} new tokens")
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper center")
    figure.savefig(args.out / "generate.png", dpi=120)
