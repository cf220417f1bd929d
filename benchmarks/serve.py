"""A server under load, dense beside pruned: python -m benchmarks.serve [--model scenes] [--size large] [--concurrency 1 4 16]

One server, one memory budget for caches. Users ask mixed questions about mixed pictures, in a closed loop (every user asks again at once)
and in an open one (Poisson arrivals). Then the same questions in static batches without a server, and several questions about one picture
with and without the vision cache. Writes serve.json and serve.png.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.serve_load import Question, Timing, closed, opened, questions, stages

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Args:
    """Load a server."""

    model: str = ""
    """A model with a glimpse, such as scenes; by default a random one of --size."""
    size: Literal["large", "mid", "small"] = "large"
    """Of the random model: 0.5 B parameters, 40 M, or one to try the benchmark itself."""
    sides: tuple[int, int] = (16, 28)
    """Fewest and most visual tokens along the side of a picture."""
    unit: int = 28
    """Pixels along the side of a visual token; 16 for scenes."""
    new_tokens: int = 32
    """Tokens of an answer."""
    requests: int = 32
    """Of every run in the closed loop with 8 users and more; fewer users ask fewer."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Users of the closed loop."""
    rates: tuple[float, ...] = (0.5, 1.0)
    """Arrivals of the open loop, as shares of the dense closed loop's best requests per second."""
    contenders: tuple[Literal["dense", "glimpse", "cap"], ...] = ("dense", "glimpse", "cap")
    """Who is measured."""
    retention: float = 0.074
    """Share of the visual tokens that stays: in the random model's glimpse, whose threshold means nothing."""
    cap: float = 0.05
    """The cap of the contender cap."""
    kv_memory: str = "64M"
    """Budget of the caches."""
    max_prompt: int = 1024
    """Longest prompt of the server."""
    max_rows: int = 16
    """Most rows of a pool."""
    static: tuple[int, ...] = (1, 8, 16)
    """Sizes of static batches; none: they are not measured."""
    follow_ups: int = 4
    """Questions about one picture; 0: not measured."""
    rounds: int = 1
    """Times that everything is measured, in turns."""
    out: Path = Path("runs/bench/serve")
    """Folder of serve.json and serve.png."""


class Running:
    """`gp-jax serve` as a process of its own."""

    def __init__(self, model: str, args: Args, **options: object):
        options = dict(kv_memory=args.kv_memory, max_prompt=args.max_prompt, max_rows=args.max_rows, queue=256, timeout=36000.0) | options
        options |= dict(max_new_tokens=args.new_tokens, max_pictures=1, port=0)
        flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "gp_jax", "serve", model, *flags]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if " at http" not in line:
            sys.exit(f"the server ended with {self.process.wait()}")
        self.url, self.model, self.seconds = line.rpartition(" at ")[2].strip().removesuffix("/v1"), model, time.perf_counter() - start

    def end(self) -> None:
        """As a service manager would."""
        self.process.send_signal(signal.SIGTERM)
        if status := self.process.wait(60):
            sys.exit(f"the server ended with {status}")


def rules(args: Args) -> dict[str, object]:
    """Per contender the field `prune` of its requests."""
    glimpse = "auto" if args.model else {"fixed_remain_ratio": args.retention}
    cap = {"max_remain_ratio": args.cap} if args.model else {"fixed_remain_ratio": args.cap}
    return {name: rule for name, rule in dict(dense=None, glimpse=glimpse, cap=cap).items() if name in args.contenders}


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and tails."""
    import numpy as np

    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} if values else {}


def summary(timings: list[Timing], seconds: float, spent: dict[str, float]) -> dict:
    """What a run shows. spent: seconds of the server by stage."""
    good = [timing for timing in timings if not timing.error]
    visual = sum(timing.visual for timing in good)
    return dict(
        requests=len(timings),
        failed=len(timings) - len(good),
        seconds=seconds,
        per_second=len(good) / seconds,
        tokens_per_second=sum(timing.new for timing in good) / seconds,
        first=quantiles([timing.first for timing in good]),
        gap=quantiles([gap for timing in good for gap in timing.gaps]),
        all=quantiles([timing.all for timing in good]),
        kept=sum(timing.kept for timing in good) / visual if visual else 1.0,
        stages=spent,
    )


def measured(url: str, run: object) -> dict:
    """Runs a load, with what the server spent on it."""
    before = stages(url)
    timings, seconds = asyncio.run(run)
    time.sleep(1.2)  # the gauges are set once a second when nothing runs
    after = stages(url)
    return summary(timings, seconds, {name: after[name] - before[name] for name in after})


def loads(server: Running, args: Args) -> list[dict]:
    """Closed and open loops of every contender, in turns."""
    found, best = [], 0.0
    for number in range(args.rounds):
        for users in args.concurrency:
            count = min(args.requests, max(4, 4 * users))
            asked = questions(count, args.sides, args.unit, count, seed=1000 * number + users)
            for name, prune in rules(args).items():
                own = measured(server.url, closed(server.url, server.model, asked, prune, args.new_tokens, users))
                found.append(dict(loop="closed", contender=name, users=users, round=number, **own))
                best = max(best, own["per_second"]) if name == "dense" else best
                say(found[-1])
        for share in args.rates if best else ():
            asked = questions(args.requests, args.sides, args.unit, args.requests, seed=5000 + number)
            for name, prune in rules(args).items():
                own = measured(server.url, opened(server.url, server.model, asked, prune, args.new_tokens, share * best, number))
                found.append(dict(loop="open", contender=name, rate=share * best, round=number, **own))
                say(found[-1])
    return found


def say(run: dict) -> None:
    """One line of a run."""
    load = f"{run['users']:>3} users  " if run["loop"] == "closed" else f"{run['rate']:5.2f} req/s"
    times = "".join(f"  {name} {1e3 * run[name].get('p50', 0):6.0f} {1e3 * run[name].get('p95', 0):6.0f} ms" for name in ("first", "gap"))
    total = sum(run["stages"].values()) or 1
    shares = " ".join(f"{name} {value / total:.0%}" for name, value in run["stages"].items())
    print(f"{run['contender']:8}{run['loop']:7}{load} {run['per_second']:6.3f} req/s{times}  kept {run['kept']:.1%}  {shares}", flush=True)


def static(model: str, args: Args) -> list[dict]:
    """The same questions in batches of one size, without a server, in a process of its own."""
    found = []
    for size in args.static:
        for name, prune in rules(args).items():
            given = json.dumps([model, size, prune, args.new_tokens, args.sides, args.unit, max(size, min(args.requests, 2 * size))])
            done = subprocess.run([sys.executable, "-m", "benchmarks.serve", "static", given], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            found.append(dict(contender=name, batch=size, **json.loads(done.stdout.splitlines()[-1])))
            print(f"{name:8}static batches of {size:2}  {found[-1]['per_second']:6.3f} req/s", flush=True)
    return found


def static_worker(given: str) -> None:
    """Answers questions in batches; the first batches compile and are not counted."""
    from gp_jax.runtime.allocator import keep_memory

    keep_memory()
    import base64
    import io

    from PIL import Image

    from gp_jax import GlimpseVLM, Prune

    model, size, rule, new_tokens, sides, unit, count = json.loads(given)
    vlm = GlimpseVLM.from_pretrained(model)
    prune = Prune(**rule) if isinstance(rule, dict) else rule
    asked = questions(count, sides, unit, count)
    images = [Image.open(io.BytesIO(base64.b64decode(own.url.partition(",")[2]))) for own in asked]

    def run() -> None:
        for first in range(0, count, size):
            part = slice(first, first + size)
            vlm.answer([[image] for image in images[part]], [own.text for own in asked[part]], prune=prune, max_new_tokens=new_tokens)

    run()
    start = time.perf_counter()
    run()
    print(json.dumps(dict(per_second=count / (time.perf_counter() - start))))


def follow_ups(model: str, args: Args) -> list[dict]:
    """Several questions about each picture, with and without the vision cache."""
    found, count = [], max(args.follow_ups, args.requests // args.follow_ups * args.follow_ups)
    pictures = count // args.follow_ups
    one_each = questions(pictures, args.sides, args.unit, pictures, seed=7)
    asked = [Question(own.url, f"{own.text} ({k})") for k in range(args.follow_ups) for own in one_each]
    for memory in ("1G", "0"):
        server = Running(model, args, vision_cache=memory)
        for name, prune in rules(args).items():
            run = closed(server.url, server.model, asked, prune, args.new_tokens, 4)
            found.append(dict(contender=name, vision_cache=memory, **measured(server.url, run)))
            print(f"{name:8}{args.follow_ups} questions a picture, cache {memory:3} {found[-1]['per_second']:6.3f} req/s", flush=True)
        server.end()
    return found


def main(args: Args) -> int:
    """Runs it. Returns: exit status."""
    from benchmarks import random_model
    from benchmarks.serve_report import plot, verdicts

    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or str(Path(scratch) / "model")
        if not args.model:
            random_model.write(Path(model), args.size)
        Running(model, args).end()  # what is measured finds its programs compiled
        server = Running(model, args)
        print(f"ready after {server.seconds:.1f} s, caches {args.kv_memory}", flush=True)
        found = dict(args=asdict(args) | dict(out=str(args.out)), cores=len(os.sched_getaffinity(0)), start=server.seconds)
        found["loads"] = loads(server, args)
        server.end()
        found["static"] = static(model, args) if args.static else []
        found["follow_ups"] = follow_ups(model, args) if args.follow_ups else []
    found["verdicts"] = verdicts(found)
    print("\n".join(f"{name}: {value}" for name, value in found["verdicts"].items()))
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / ".serve.partial"
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(args.out / "serve.json")
    plot(found, args.out / "serve.png")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["static"]:
        static_worker(sys.argv[2])
    else:
        sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.serve")))
