"""Time, memory and compilation over the size of a request: python -m benchmarks.scaling [--tokens 256 1024] [--batches 1 4] [--size mid]

Every point (visual tokens, batch) is a process of its own that answers dense and at every retention in turns, so that its ratios come
from one interleaved run. Pictures are square unless --photos names files, which are then asked about as they are. Every point compiles
for itself, into an empty cache, dense first: a retention's programs are those that it needs besides. What is measured is written after
every point.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.contenders import Contender, interleave, reset_peak, resident, serve
from benchmarks.generate import QUESTION, STAGES, fixed_look, picture, staged


@dataclass(frozen=True)
class Args:
    """Requests of many sizes, dense and pruned."""

    tokens: tuple[int, ...] = (256, 1024, 4096, 16384)
    """Visual tokens of a picture (rounded to squares)."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Samples of a request."""
    most: int = 16384
    """Visual tokens of a request, at most: larger points are left out."""
    retentions: tuple[float, ...] = (0.02, 0.074, 0.25, 0.5, 0.75, 0.9, 1.0)
    """Shares of the visual tokens that the cut keeps; at 1 nothing is cut."""
    looks: tuple[float, ...] = (0.25,)
    """Two looks: shares of the vision windows that the second one sees; the cut then keeps the smallest of the retentions."""
    look_share: float = 0.25
    """Share of the visual tokens that a first look has."""
    photos: tuple[Path, ...] = ()
    """Pictures to ask about instead, one point each and one with all of them as a batch."""
    size: Literal["large", "mid", "small"] = "mid"
    """Of the random model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""
    new_tokens: int = 16
    """Tokens of the answer."""
    rounds: int = 3
    """Timed requests of each kind."""
    out: Path = Path("runs/bench/scaling")
    """Folder of scaling.json and scaling.png."""


def worker(
    folder: str, dtype: str, tokens: str, batch: str, new_tokens: str, retentions: str, looks: str, share: str, *photos: str
) -> None:
    """One point: answers the kinds of request in turns, however it is asked."""
    from gp_jax.runtime.allocator import keep_memory

    keep_memory()
    from gp_jax import GlimpseVLM, Prune
    from gp_jax.runtime.clock import COMPILES

    vlm = GlimpseVLM.from_pretrained(folder, dtype=dtype)
    images = [*photos] if photos else [picture(round(int(tokens) ** 0.5))] * int(batch)
    kinds = {"dense": None} | {name: Prune(fixed_remain_ratio=float(name)) for name in retentions.split(",")}
    least = min(map(float, retentions.split(",")))
    for seen in filter(None, looks.split(",")):
        kinds[f"look {seen}"] = Prune(fixed_remain_ratio=least, look=fixed_look(float(share), float(seen)))
    compiled, order, visual = {}, list(kinds), [0]

    def answer(kind: str) -> dict[str, float]:
        done = vlm.answer(images, [QUESTION] * len(images), prune=kinds[kind], max_new_tokens=int(new_tokens), eos_token_id=None)
        seconds, visual[0] = done[0].timings, sum(one.total for one in done)
        return staged(seconds)

    for kind in order:
        count, spent = COMPILES.count, COMPILES.seconds
        answer(kind)
        compiled[kind] = dict(programs=COMPILES.count - count, compiling=COMPILES.seconds - spent)
    peaks: dict[str, float] = {}

    def request() -> dict[str, float]:
        found = {}
        order.append(order.pop(0))
        for kind in order:
            before = reset_peak()
            found |= {f"{kind} {stage}": value for stage, value in answer(kind).items()}
            peaks[kind] = max(peaks.get(kind, 0.0), resident("VmHWM") - before)
        return found

    serve(dict(compiled=compiled, visual=visual[0]), request, lambda: dict(peaks=peaks))


def main(args: Args) -> int:
    """Runs it. Returns: exit status."""
    from benchmarks import random_model
    from gp_jax.runtime.progress import Progress

    points = [(str(round(n**0.5) ** 2), str(b), ()) for n in args.tokens for b in args.batches if n * b <= args.most]
    if args.photos:
        points = [("0", "1", (photo.resolve(),)) for photo in args.photos]
        points += [("0", str(len(args.photos)), tuple(photo.resolve() for photo in args.photos))] if len(args.photos) > 1 else []
    retentions, looks = ([*map(str, shares)] for shares in (args.retentions, args.looks))
    kinds, found = [*retentions, *(f"look {seen}" for seen in looks)], []
    print(f"{args.size} model, {args.dtype}, {args.new_tokens} new tokens, medians of {args.rounds} interleaved rounds")
    print(
        f"{'request':>24}{'kept':>10}"
        + "".join(f"{s + ' s':>13}" for s in (*STAGES, "first", "total"))
        + f"{'/ dense':>9}{'MiB':>8}{'programs':>10}{'compile s':>11}"
    )
    with tempfile.TemporaryDirectory() as scratch, Progress(points, unit="point") as bar:
        random_model.write(Path(scratch), args.size)
        for tokens, batch, photos in bar:
            name = " + ".join(photo.name for photo in photos) or f"{batch} x {tokens}"
            bar.set_description(name)
            lists = (",".join(retentions), ",".join(looks), args.look_share)
            options = (scratch, args.dtype, tokens, batch, args.new_tokens, *lists, *photos)
            empty = tempfile.mkdtemp(prefix="compiled.", dir=scratch)
            contender = Contender(name, "benchmarks.scaling", *options, JAX_COMPILATION_CACHE_DIR=empty)
            interleave([contender], args.rounds, warm=0)
            end = contender.end()
            for kind in ("dense", *kinds):
                times = {stage: contender.median(f"{kind} {stage}") for stage in (*STAGES, "first", "total")}
                ratio = times["total"] / contender.median("dense total")
                noise = contender.spread(f"{kind} total") + contender.spread("dense total")
                entry = dict(
                    request=name, tokens=contender.ready["visual"], batch=int(batch), kept=kind, seconds=times, ratio=ratio, noise=noise
                )
                entry |= dict(spread=contender.spread(f"{kind} total"), peak=end["peaks"][kind], **contender.ready["compiled"][kind])
                found.append(entry | dict(results=[{k: v for k, v in r.items() if k.startswith(f"{kind} ")} for r in contender.results]))
                row = "".join(f"{value:13.3f}" for value in times.values())
                label = named(kind).removesuffix(" kept")
                tail = f"{ratio:9.2f}{entry['peak']:8.0f}{entry['programs']:10}{entry['compiling']:11.1f}"
                Progress.write(f"{name[-24:]:>24}{label:>10}{row}{tail}")
            write(args.out, found)
    plot(args, found)
    print("\n".join(verdict(found)))
    return 0


def write(out: Path, found: list[dict]) -> None:
    """What has been measured so far, whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    hidden = out / ".scaling.partial"
    hidden.write_text(json.dumps(found, indent=1))
    hidden.replace(out / "scaling.json")


def named(kind: str) -> str:
    """A kind of request for people."""
    return f"{float(kind):.1%} kept" if kind[0].isdigit() else kind


def verdict(found: list[dict]) -> Iterator[str]:
    """How many pruned requests were slower than dense by more than the noise of the two, and which."""
    pruned = [entry for entry in found if entry["kept"] != "dense"]
    slower = [entry for entry in pruned if entry["ratio"] > 1 + entry["noise"]]
    above = sum(entry["ratio"] > 1 for entry in pruned)
    yield (
        f"pruned requests slower than dense: {len(slower)} of {len(pruned)}, beyond the noise of the point (the spreads of both, half the "
        f"distance between quartiles each); {above} have a ratio above 1"
    )
    for entry in slower:
        yield f"  {entry['request']}, {named(entry['kept'])}: {entry['ratio']:.2f} x dense, noise {entry['noise']:.1%}"
    for entry in (e for e in found if e["kept"].startswith("look")):
        same = {e["kept"]: e["seconds"]["first"] for e in found if e["request"] == entry["request"]}
        least = min((kind for kind in same if kind[0].isdigit()), key=float)
        first = entry["seconds"]["first"]
        yield (
            f"first token, {entry['request']}, {named(entry['kept'])}: {first:.3f} s, {first / same['dense']:.2f} x dense, "
            f"{first / same[least]:.2f} x {named(least)} with one look"
        )


def plot(args: Args, found: list[dict]) -> None:
    """Over visual tokens of a request, a line per retention, a panel per batch size: above seconds, below parts of the dense seconds with
    their noise."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    batches = sorted({entry["batch"] for entry in found})
    figure, panels = pyplot.subplots(
        2, len(batches), figsize=(2 + 3.5 * len(batches), 7), sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    for (above, below), batch in zip(panels.T, batches, strict=True):
        for kind in dict.fromkeys(entry["kept"] for entry in found):
            own = sorted((e for e in found if e["kept"] == kind and e["batch"] == batch), key=lambda e: e["tokens"])
            tokens, name = [e["tokens"] for e in own], named(kind)
            above.loglog(tokens, [e["seconds"]["total"] for e in own], marker="o", label=name)
            noise = None if kind == "dense" else [e["noise"] for e in own]
            below.errorbar(tokens, [e["ratio"] for e in own], noise, marker="o", capsize=3, alpha=0.8)
        ticks = sorted({entry["tokens"] for entry in found if entry["batch"] == batch})
        for axes in (above, below):
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        below.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        above.set_title(f"batch {batch}")
        below.set_xlabel("visual tokens of a request")
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("pruned / dense")
    panels[0, 0].legend()
    figure.savefig(args.out / "scaling.png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "worker":
        worker(*sys.argv[2:])
    else:
        sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.scaling")))
