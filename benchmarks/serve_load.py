"""A server as a process of its own, and its users: requests with OpenAI's client, streamed, in a closed or an open loop."""

import asyncio
import base64
import io
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import numpy as np
import openai
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("What does the sign say?", "How many people are there?", "What colour is the car on the left?", "Describe the small object.")


class Running:
    """`gp-jax serve` as a process of its own."""

    def __init__(self, model: str, **options: object):
        """options: of the command, with underscores."""
        flags: list[str] = []
        for name, value in {**options, "port": 0}.items():
            flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        command = [sys.executable, "-m", "gp_jax", "serve", model, *flags]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if " at http" not in line:
            sys.exit(f"the server ended with {self.process.wait()}")
        self.url, self.model, self.seconds = line.rpartition(" at ")[2].strip().removesuffix("/v1"), model, time.perf_counter() - start

    @property
    def processor(self) -> float:
        """Seconds of processor time so far, of all its threads; on Linux only."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.nan
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """As a service manager would."""
        self.process.send_signal(signal.SIGTERM)
        if status := self.process.wait(60):
            sys.exit(f"the server ended with {status}")


@dataclass(frozen=True)
class Question:
    """A picture, as a data: URL, and what is asked about it."""

    url: str
    text: str

    @property
    def messages(self) -> list[dict]:
        """As a request has it."""
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": self.url}}, {"type": "text", "text": self.text}]}]


@dataclass
class Timing:
    """One request. first, all: seconds; gaps: seconds between deliveries, per token; kept, visual, new: tokens; error: instead of them."""

    first: float = 0.0
    all: float = 0.0
    gaps: tuple[float, ...] = ()
    kept: int = 0
    visual: int = 0
    new: int = 0
    error: str = ""


def questions(
    count: int, sides: tuple[int, int], unit: int, pictures: int, seed: int = 0, salt: int = 0, repeated: bool = True
) -> list[Question]:
    """Questions about random pictures of mixed sizes.

    Args: sides: fewest and most visual tokens along a side; unit: pixels of one; pictures: sizes of pictures, asked about in turns; salt:
        other pictures of the same sizes; repeated: whether a size is one picture, or another one for every question.
    """
    sizes = np.random.default_rng(seed).integers(sides[0], sides[1] + 1, (min(pictures, count), 2)) * unit
    urls: dict[tuple[int, int], str] = {}

    def url(number: int) -> str:
        which = number % len(sizes), 0 if repeated else number
        if which not in urls:
            height, width = (int(side) for side in sizes[which[0]])
            random, file = np.random.default_rng([seed, salt, *which]), io.BytesIO()
            small = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((width, height)).save(file, "JPEG")
            urls[which] = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        return urls[which]

    return [Question(url(k), f"{QUESTIONS[k % len(QUESTIONS)]} ({k})") for k in range(count)]


async def ask(client: openai.AsyncOpenAI, model: str, question: Question, prune: object, new_tokens: int) -> Timing:
    """One request, timed."""
    start, last, gaps, found = time.perf_counter(), 0.0, [], Timing()
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=question.messages,
            max_tokens=new_tokens,
            temperature=0,
            stream=True,
            logprobs=True,  # so that a token whose text is not whole yet is delivered too
            stream_options={"include_usage": True},
            extra_body={"prune": prune},
        )
        async for chunk in stream:
            now = time.perf_counter()
            if chunk.usage:
                details = chunk.usage.prompt_tokens_details
                found.kept, found.visual, found.new = details.kept_tokens, details.visual_tokens, chunk.usage.completion_tokens
            elif chunk.choices and (chunk.choices[0].logprobs or chunk.choices[0].delta.content):
                if last:
                    gaps.append(now - last)
                else:
                    found.first = now - start
                last = now
    except openai.OpenAIError as error:
        found.error = type(error).__name__
    found.all, found.gaps = time.perf_counter() - start, tuple(gaps)
    return found


def stages(url: str) -> dict[str, float]:
    """Seconds of the server's answering thread so far, by stage."""
    found = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("gp_jax:stage_seconds{"):
            found[line.partition('stage="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
    return found


async def closed(
    url: str, model: str, asked: list[Question], prune: object, new_tokens: int, concurrency: int
) -> tuple[list[Timing], float]:
    """`concurrency` users, each of whom asks again as soon as an answer is whole. Returns: timings, seconds of all."""
    left, done = iter(asked), []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:

        async def user() -> None:
            for question in left:
                done.append(await ask(client, model, question, prune, new_tokens))

        start = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(concurrency)))
        return done, time.perf_counter() - start


async def opened(
    url: str, model: str, asked: list[Question], prune: object, new_tokens: int, rate: float, seed: int = 0
) -> tuple[list[Timing], float]:
    """Requests that come whether or not others are answered, `rate` a second on average (Poisson). Returns: timings, seconds of all."""
    random = np.random.default_rng(seed)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:
        start, tasks = time.perf_counter(), []
        for question in asked:
            tasks.append(asyncio.create_task(ask(client, model, question, prune, new_tokens)))
            await asyncio.sleep(random.exponential(1 / rate))
        return list(await asyncio.gather(*tasks)), time.perf_counter() - start
