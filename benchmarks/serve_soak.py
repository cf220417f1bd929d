"""A server among strangers: python -m benchmarks.serve_soak [--seconds 300] [--model scenes]

For the given time users ask (answers must equal those that each question got alone), leave in the middle of an answer, do not read it, and
send garbage, pictures that are too large and bodies that never end. The server's memory is read all along. Writes serve_soak.json.
Exit status 1 when an answer differs, a refusal is not one of the expected ones, or the server does not end well.
"""

import asyncio
import base64
import json
import random
import struct
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx2 as httpx
import tyro

from benchmarks.serve_load import Question, Running, questions

RULES: dict[str, object] = {"dense": None, "glimpse": "auto", "cap": {"max_remain_ratio": 0.1}, "look": {"look": True}}


@dataclass(frozen=True)
class Args:
    """Trouble a server."""

    model: str = "scenes"
    """A model with a glimpse."""
    seconds: float = 300.0
    """Of trouble, after the questions were asked alone."""
    users: int = 6
    """Who ask and read, and whose answers are compared."""
    others: int = 2
    """Of every kind of trouble."""
    unit: int = 16
    """Pixels along the side of a visual token."""
    sides: tuple[int, int] = (8, 24)
    """Fewest and most visual tokens along the side of a picture."""
    new_tokens: int = 32
    """Tokens of an answer."""
    out: Path = Path("runs/bench/serve_soak")
    """Folder of serve_soak.json."""


@dataclass
class Seen:
    """What happened."""

    counts: Counter = field(default_factory=Counter)  # of answers, refusals by status, and what was wrong
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB of the server


def body(args: Args, question: Question, rule: object, **more: object) -> dict:
    """A request."""
    own = dict(model=args.model, messages=question.messages, max_tokens=args.new_tokens, temperature=0, prune=rule)
    return own | dict(seed=1, logprobs=True, top_logprobs=2) | more


def bomb(side: int) -> str:
    """A PNG of few bytes that is a picture of side x side pixels, as a data: URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Soak:
    """One run."""

    def __init__(self, args: Args, server: Running):
        self.args, self.server, self.seen = args, server, Seen()
        self.asked = questions(12, args.sides, args.unit, 12, seed=3)
        self.alone: dict[tuple[int, str], str] = {}
        self.where, self.end = f"{server.url}/v1/chat/completions", 0.0

    async def answer(self, client: httpx.AsyncClient, number: int, name: str) -> str:
        """A whole answer's text and tokens."""
        found = await client.post(self.where, json=body(self.args, self.asked[number], RULES[name]))
        if found.status_code != 200:
            self.seen.counts[f"answer refused with {found.status_code}"] += 1
            return ""
        choice = found.json()["choices"][0]
        return choice["message"]["content"] + "|" + " ".join(entry["token"] for entry in choice["logprobs"]["content"])

    async def user(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Asks what was asked alone, and compares."""
        while time.monotonic() < self.end:
            key = chance.randrange(len(self.asked)), chance.choice([*RULES])
            text = await self.answer(client, *key)
            self.seen.counts["answers"] += 1
            self.seen.counts["answers that differ"] += bool(text) and text != self.alone[key]

    async def leaver(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Leaves before or within an answer."""
        while time.monotonic() < self.end:
            own = body(self.args, chance.choice(self.asked), RULES[chance.choice([*RULES])], stream=True)
            left = chance.randrange(12)
            try:
                async with asyncio.timeout(chance.uniform(0.05, 3)), client.stream("POST", self.where, json=own) as reply:
                    async for _ in reply.aiter_lines():
                        left -= 1
                        if left < 0:
                            break
            except TimeoutError:
                pass
            self.seen.counts["left"] += 1

    async def sleeper(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Asks for a stream and does not read it; or begins a body and does not end it."""
        host, port = self.server.url.removeprefix("http://").split(":")
        while time.monotonic() < self.end:
            _, writer = await asyncio.open_connection(host, int(port), limit=64)
            data = json.dumps(body(self.args, chance.choice(self.asked), None, stream=True)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + (data if chance.random() < 0.5 else data[: len(data) // 2]))
            await asyncio.sleep(chance.uniform(1, 8))
            writer.close()
            self.seen.counts["did not read, or did not write"] += 1

    async def stranger(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Sends what cannot be answered. Every reply must be a refusal that is meant for it."""
        good = json.dumps(body(self.args, self.asked[0], "auto")).encode()
        huge, broken = Question(bomb(30_000), "?"), Question("data:image/png;base64,AAAA", "?")
        while time.monotonic() < self.end:
            made = [
                chance.randbytes(chance.randrange(1, 4000)),
                good[: chance.randrange(1, len(good))],
                json.dumps(body(self.args, huge, "auto")).encode(),
                json.dumps(body(self.args, broken, "auto")).encode(),
                json.dumps(body(self.args, self.asked[0], {"max_remain_ratio": chance.choice([-1, 7, "x", [], {}])})).encode(),
                json.dumps(body(self.args, self.asked[0], "auto", max_tokens=10**9)).encode(),
                json.dumps(body(self.args, Question(self.asked[0].url, "long " * 5000), "auto")).encode(),
            ]
            found = await client.post(self.where, content=chance.choice(made), headers={"Content-Type": "application/json"})
            self.seen.counts["refused" if found.status_code == 400 else f"stranger got {found.status_code}"] += 1
            await asyncio.sleep(0.2)

    async def watch(self) -> None:
        """Reads the server's memory."""
        start, path = time.monotonic(), Path(f"/proc/{self.server.process.pid}/status")
        while time.monotonic() < self.end:
            held = next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("VmRSS"))
            self.seen.memory.append((time.monotonic() - start, held / 1024))
            await asyncio.sleep(1)

    async def run(self) -> None:
        """Everything at once."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            for number in range(len(self.asked)):
                for name in RULES:
                    self.alone[number, name] = await self.answer(client, number, name)
            self.end = time.monotonic() + self.args.seconds
            kinds = [(self.user, self.args.users), *((kind, self.args.others) for kind in (self.leaver, self.sleeper, self.stranger))]
            workers = [kind(client, random.Random(f"{kind.__name__} {k}")) for kind, count in kinds for k in range(count)]
            await asyncio.gather(self.watch(), *workers)


def main(args: Args) -> int:
    """Runs it. Returns: exit status."""
    limits = dict(max_prompt=1024, capacities=(144, 1040), max_new_tokens=args.new_tokens, kv_memory="64M", vision_cache="8M")
    server = Running(args.model, **limits, timeout=60.0, max_pictures=1)
    soak = Soak(args, server)
    asyncio.run(soak.run())
    server.end()
    memory = [held for _, held in soak.seen.memory]
    third = max(1, len(memory) // 3)
    facts = dict(counts=dict(soak.seen.counts), memory=dict(first=max(memory[:third]), last=max(memory[-third:])))
    for name, value in facts["counts"].items():
        print(f"{value:6} {name}")
    print(
        f"memory of the server, most in the first and in the last third: {facts['memory']['first']:.0f}, {facts['memory']['last']:.0f} MiB"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    given = asdict(args) | dict(out=str(args.out))
    (args.out / "serve_soak.json").write_text(json.dumps(dict(args=given, **facts, readings=soak.seen.memory), indent=1))
    bad = [name for name in facts["counts"] if name.startswith(("answers that differ", "stranger got")) and facts["counts"][name]]
    print("; ".join(bad) or "every answer equals the one alone, every refusal was meant")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.serve_soak")))
