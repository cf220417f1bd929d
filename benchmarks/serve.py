"""A server under load, dense beside pruned: python -m benchmarks.serve [--model scenes --unit 16] [--size large] [--concurrency 1 4 16]

Users ask mixed questions about mixed pictures, in a closed loop (every user asks again at once) and in an open one (Poisson arrivals). One
server has a cache budget that binds, where dense requests wait for room; another has one that does not. There also: several questions about
one picture, whose features the vision cache keeps, beside as many about pictures that are new. Then the same questions in static batches
without a server. With --locust another project's load generator asks too. Writes serve.json and serve.png. About ten minutes on two cores.
"""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.serve_load import ROOT, Running, Timing, closed, opened, questions, stages


@dataclass(frozen=True)
class Args:
    """Load a server."""

    model: str = ""
    """A model with a glimpse, such as scenes; by default a random one of --size."""
    size: Literal["large", "mid", "small"] = "mid"
    """Of the random model: 0.5 B parameters, 40 M, or one to try the benchmark itself."""
    sides: tuple[int, int] = (16, 28)
    """Fewest and most visual tokens along the side of a picture."""
    unit: int = 28
    """Pixels along the side of a visual token; 16 for scenes."""
    new_tokens: int = 128
    """Tokens of an answer."""
    requests: int = 32
    """Of every run in the closed loop with 16 users and more; fewer users ask fewer."""
    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    """Users of the closed loop."""
    rates: tuple[float, ...] = (0.8,)
    """Arrivals of the open loop, as shares of the dense closed loop's best requests per second."""
    contenders: tuple[Literal["dense", "glimpse", "cap"], ...] = ("dense", "glimpse", "cap")
    """Who is measured."""
    retention: float = 0.074
    """Share of the visual tokens that stays: in the random model's glimpse, whose threshold means nothing."""
    cap: float = 0.05
    """The cap of the contender cap."""
    kv_memory: str = "32M"
    """Budget of the caches that binds."""
    roomy: str = "256M"
    """One that does not."""
    roomy_users: int = 16
    """Users of the closed loop with it."""
    max_prompt: int = 1024
    """Longest prompt of the server."""
    capacities: tuple[int, ...] = (144, 528, 1040)
    """Of its pools."""
    max_rows: int = 16
    """Most rows of a pool."""
    static: tuple[int, ...] = (4, 16)
    """Sizes of static batches; none: they are not measured."""
    follow_ups: int = 4
    """Questions about one picture; 0: not measured."""
    locust: bool = False
    """Let locust ask too (pip install "gp_jax[bench]"): its requests per second should be ours."""
    rounds: int = 1
    """Times that the loops are measured, in turns."""
    out: Path = Path("runs/bench/serve")
    """Folder of serve.json and serve.png."""


def start(model: str, args: Args, **options: object) -> Running:
    """A server with these settings."""
    common = dict(max_prompt=args.max_prompt, capacities=args.capacities, max_rows=args.max_rows, max_new_tokens=args.new_tokens)
    server = Running(model, queue=256, timeout=36000.0, max_pictures=1, **common, **options)
    print(f"ready after {server.seconds:.1f} s, caches {options['kv_memory']}", flush=True)
    return server


def rules(args: Args) -> dict[str, object]:
    """Per contender the field `prune` of its requests."""
    glimpse = "auto" if args.model else {"fixed_remain_ratio": args.retention}
    cap = {"max_remain_ratio": args.cap} if args.model else {"fixed_remain_ratio": args.cap}
    return {name: rule for name, rule in dict(dense=None, glimpse=glimpse, cap=cap).items() if name in args.contenders}


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and tails."""
    import numpy as np

    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} if values else {}


def summary(timings: list[Timing], seconds: float, processor: float, spent: dict[str, float]) -> dict:
    """What a run shows. processor: seconds of the server's processor time; spent: seconds of the server by stage."""
    good = [timing for timing in timings if not timing.error]
    visual = sum(timing.visual for timing in good)
    return dict(
        requests=len(timings),
        failed=len(timings) - len(good),
        seconds=seconds,
        per_second=len(good) / seconds,
        processor_each=processor / max(1, len(good)),  # of a request: what else runs on the machine hardly changes it
        tokens_per_second=sum(timing.new for timing in good) / seconds,
        first=quantiles([timing.first for timing in good]),
        gap=quantiles([gap for timing in good for gap in timing.gaps]),
        all=quantiles([timing.all for timing in good]),
        kept=sum(timing.kept for timing in good) / visual if visual else 1.0,
        stages=spent,
    )


def measured(server: Running, run: object) -> dict:
    """Runs a load, with what the server spent on it."""
    before, processor = stages(server.url), server.processor
    timings, seconds = asyncio.run(run)
    time.sleep(1.2)  # the gauges are set once a second when nothing runs
    after, processor = stages(server.url), server.processor - processor
    return summary(timings, seconds, processor, {name: after[name] - before[name] for name in after})


def loads(server: Running, args: Args) -> list[dict]:
    """Closed and open loops of every contender, in turns. The server has no vision cache: all are asked about the same pictures."""
    found, best = [], 0.0
    for number in range(args.rounds):
        for users in args.concurrency:
            count = min(args.requests, max(4, 3 * users))
            asked = questions(count, args.sides, args.unit, count, seed=1000 * number + users)
            for name, prune in rules(args).items():
                own = measured(server, closed(server.url, server.model, asked, prune, args.new_tokens, users))
                found.append(dict(loop="closed", budget=args.kv_memory, contender=name, users=users, round=number, **own))
                best = max(best, own["per_second"]) if name == "dense" else best
                say(found[-1])
        for share in args.rates if best else ():
            count = args.requests // 2
            asked = questions(count, args.sides, args.unit, count, seed=5000 + number)
            for name, prune in rules(args).items():
                own = measured(server, opened(server.url, server.model, asked, prune, args.new_tokens, share * best, number))
                found.append(dict(loop="open", budget=args.kv_memory, contender=name, rate=share * best, round=number, **own))
                say(found[-1])
    return found


def roomy_loads(server: Running, args: Args) -> list[dict]:
    """A closed loop with a budget that does not bind. The server has a vision cache, so everybody is asked about pictures of their own."""
    found = []
    for number in range(args.rounds):
        for salt, (name, prune) in enumerate(rules(args).items(), 1):
            asked = questions(args.requests, args.sides, args.unit, args.requests, seed=7000 + number, salt=salt)
            own = measured(server, closed(server.url, server.model, asked, prune, args.new_tokens, args.roomy_users))
            found.append(dict(loop="closed", budget=args.roomy, contender=name, users=args.roomy_users, round=number, **own))
            say(found[-1])
    return found


def say(run: dict) -> None:
    """One line of a run."""
    load = f"{run['users']:>3} users  " if run["loop"] == "closed" else f"{run['rate']:5.2f} req/s"
    times = "".join(f"  {name} {1e3 * run[name].get('p50', 0):6.0f} {1e3 * run[name].get('p95', 0):6.0f} ms" for name in ("first", "gap"))
    load = f"{load} {run['budget']:>5}"
    total = sum(run["stages"].values()) or 1
    shares = " ".join(f"{name} {value / total:.0%}" for name, value in run["stages"].items())
    speed = f"{run['per_second']:6.3f} req/s {run['processor_each']:6.2f} s of CPU each"
    print(f"{run['contender']:8}{run['loop']:7}{load} {speed}{times}  kept {run['kept']:.1%}  {shares}", flush=True)


def static(model: str, args: Args) -> list[dict]:
    """The same questions in batches of one size, without a server, in a process of its own."""
    found = []
    for size in args.static:
        for name, prune in rules(args).items():
            given = json.dumps([model, size, prune, args.new_tokens, args.sides, args.unit, max(16, size)])
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


def follow_ups(server: Running, args: Args) -> list[dict]:
    """Several questions about each picture, and as many about pictures of the same sizes that nobody has asked about."""
    found, pictures = [], max(1, args.requests // 2 // args.follow_ups)
    count = pictures * args.follow_ups
    for salt, (name, prune) in enumerate(rules(args).items(), 11):
        for known in (True, False):
            asked = questions(count, args.sides, args.unit, pictures, seed=7, salt=salt, repeated=known)
            run = closed(server.url, server.model, asked, prune, args.new_tokens, 4)
            found.append(dict(contender=name, known=known, **measured(server, run)))
            what = f"{args.follow_ups} questions a picture" if known else "a picture per question"
            print(f"{name:8}{what:24} {found[-1]['per_second']:6.3f} req/s", flush=True)
    return found


def locust(server: Running, args: Args) -> dict[str, float]:
    """Requests per second that locust counts, by contender, beside those that our own client counts for the same questions."""
    found = {}
    for salt, (name, prune) in enumerate(rules(args).items(), 21):
        asked = questions(args.requests, args.sides, args.unit, args.requests, seed=8000, salt=salt)
        given = dict(model=server.model, max_tokens=args.new_tokens, temperature=0, prune=prune)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([given | dict(messages=own.messages) for own in asked], file)
            file.flush()
            command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--json", "--host", server.url]
            command += ["-f", str(ROOT / "benchmarks/serve_locust.py"), "-u", str(args.roomy_users), "-r", "1000"]
            done = subprocess.run(command, env=os.environ | {"GP_JAX_ASKED": file.name}, stdout=subprocess.PIPE, text=True)
        (entry,) = json.loads(done.stdout)
        seconds = entry["last_request_timestamp"] - entry["start_time"] + entry["min_response_time"] / 1e3  # begun with an answer
        found[name] = (entry["num_requests"] - entry["num_failures"]) / seconds
        print(f"{name:8}locust, {args.roomy_users} users  {found[name]:6.3f} req/s, {entry['num_failures']} failed", flush=True)
    return found


def main(args: Args) -> int:
    """Runs it. Returns: exit status."""
    from benchmarks import random_model
    from benchmarks.serve_report import plot, verdicts

    if args.locust and importlib.util.find_spec("locust") is None:
        sys.exit("--locust needs locust: pip install 'gp_jax[bench]'")
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or str(Path(scratch) / "model")
        if not args.model:
            random_model.write(Path(model), args.size)
        found = dict(args=asdict(args) | dict(out=str(args.out)), cores=len(os.sched_getaffinity(0)))
        server = start(model, args, kv_memory=args.kv_memory, vision_cache="0")
        found["start"] = server.seconds
        found["loads"] = loads(server, args)
        server.end()
        server = start(model, args, kv_memory=args.roomy)
        found["loads"] += roomy_loads(server, args)
        found["follow_ups"] = follow_ups(server, args) if args.follow_ups else []
        found["locust"] = locust(server, args) if args.locust else {}
        server.end()
        found["static"] = static(model, args)
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
