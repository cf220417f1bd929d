"""A whole request, stage by stage, against transformers: python -m benchmarks.generate [--side 32] [--new-tokens 32] [--rounds 5]

A random model at real proportions (0.5 B parameters) answers about one picture. Contenders: gp_jax with two looks, pruned and dense,
transformers in torch on the same weights, each in float32 and bfloat16, each in a process of its own, asked in turns. Below the table:
ratios, memory, and the roofline, the machine's own product rate and memory bandwidth measured in the same run. Needs torch
(`pip install ".[test]"`).
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.contenders import Contender, interleave, serve
from benchmarks.generate_report import READING, STAGES, report

QUESTION = "What does the sign say?"


@dataclass(frozen=True)
class Args:
    """Compare whole requests."""

    side: int = 32
    """Of the picture, in visual tokens: 32 is 896 x 896 pixels, 1,024 visual tokens."""
    new_tokens: int = 32
    """Tokens of the answer."""
    retention: float = 0.074
    """Share of the visual tokens that the cut keeps."""
    look_share: float = 0.25
    """Share of the visual tokens that the first look of the contender look has."""
    seen: float = 0.25
    """Share of the vision windows that its second look sees: random weights do not know which, so the number is fixed."""
    rounds: int = 5
    """Timed requests of each contender."""
    size: Literal["large", "mid", "small"] = "large"
    """Of the model: 0.5 B parameters, 40 M, or one to try the benchmark itself."""
    contenders: tuple[Literal["look", "pruned", "dense", "transformers"], ...] = ("look", "pruned", "dense", "transformers")
    """Who takes part."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """In which precisions."""
    out: Path = Path("runs/bench/generate")
    """Folder of generate.json and generate.png."""


def picture(side: int):
    """A picture of side x side visual tokens."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (28 * side, 28 * side, 3), dtype=np.uint8))


def fixed_look(share: float, seen: float):
    """A look that always sees this share of the windows."""
    from gp_jax import Look

    return Look(share=share, threshold=1.0, floor=seen, cap=seen, sure=None)


def staged(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds per stage of `STAGES`, and their sums."""
    stages = {name: seconds[name] for name in ("processing", "look", "vision")}
    stages |= dict(prefill=seconds["glimpse"] + seconds["finish"], decode=seconds["decode"])
    return stages | dict(first=sum(stages[name] for name in READING), total=sum(stages[name] for name in STAGES))


def run_ours(folder: Path, dtype: str, retention: str, look_share: str, seen: str, side: str, new_tokens: str) -> None:
    """gp_jax; retention 1 is dense, seen 1 is one look."""
    from gp_jax.runtime.allocator import keep_memory

    keep_memory()
    started = time.perf_counter()
    import jax
    from flax import nnx

    from benchmarks.contenders import resident
    from gp_jax import GlimpseVLM, Prune
    from gp_jax.runtime.clock import COMPILES

    jax.devices()
    python, imported = resident(), time.perf_counter()
    vlm = GlimpseVLM.from_pretrained(folder, dtype=dtype)
    weights, loaded = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(vlm.model))), time.perf_counter()
    image, tokens = picture(int(side)), int(new_tokens)
    look = fixed_look(float(look_share), float(seen)) if float(seen) < 1 else None
    prune = Prune(fixed_remain_ratio=float(retention), look=look) if float(retention) < 1 else None
    last = {}

    def request() -> dict[str, float]:
        answer = vlm.answer(image, QUESTION, prune=prune, max_new_tokens=tokens, eos_token_id=None)
        seconds = answer.timings
        last.update(answer=answer, total=answer.total)
        return staged(seconds) | dict(glimpse=seconds["glimpse"], finish=seconds["finish"])

    prefix = vlm.engine.prefix

    def measured(filled):
        last["kv"] = cache_bytes(filled.stream.kv)
        return prefix(filled)

    vlm.engine.prefix = measured
    request()
    vlm.engine.prefix = prefix  # the timed requests run as they are
    ready = dict(load=loaded - started, first=time.perf_counter() - loaded, weights=weights / 2**20, python=python)
    ready |= dict(reading=loaded - imported, compiled=COMPILES.count - COMPILES.read, read=COMPILES.read)
    prompt = vlm.processor([[image]], [QUESTION]).inputs["input_ids"].shape[1]
    ready |= analytic(vlm, prompt - last["total"], last["answer"], float(retention), 2 if dtype == "bfloat16" else 4)
    held, needed = last["kv"]
    serve(ready, request, lambda: dict(cache=held / 2**20, cache_needed=needed / 2**20))


def cache_bytes(kv: tuple) -> tuple[int, float]:
    """Bytes of the caches' arrays, and of these what rows of the prompt fill: the rest is padding."""
    sizes = [(layer.key.nbytes + layer.value.nbytes, float(layer.valid.mean())) for layer in kv]
    return sum(size for size, _ in sizes), sum(size * share for size, share in sizes)


def analytic(vlm, text: int, answer, retention: float, itemsize: int) -> dict[str, float]:
    """From sizes alone: FLOPs of the decoder's prefill, and of all before the first token; MiB of its cache, and MiB of the activations of
    one block, the largest: what goes in, comes out and lies between its products (float32, as they accumulate)."""
    from gp_jax.flops import Workload, first_look, stages

    config, glimpse = vlm.config, vlm.glimpse_config if retention < 1 else None
    work = Workload.of(config.vision, [keep.shape for keep in answer.keep], text, 1)
    work = work.seeing(config.vision, answer.windows)
    kept = min(1.0, (answer.kept + 0.5) / work.visual)
    found = stages(config, glimpse, work, ((glimpse.reduce_layer, kept),) if glimpse else (), itemsize=itemsize)
    reading = found["prefill"].flops
    if glimpse and answer.look:
        reading += first_look(config, glimpse, Workload.of(config.vision, answer.look.grids, text, 1), itemsize=itemsize).flops

    def block(rows: int, size) -> int:
        return 4 * rows * (6 * size.hidden_size + 2 * size.intermediate_size)

    most = max(block(work.patches, config.vision), block(text + work.visual, config.text))
    token = stages(config, None, Workload(0, 0, 1, 2, 1), itemsize=itemsize)["decode token"].bytes  # of so short a text: weights alone
    return dict(
        flops=found["decoder prefill"].flops,
        reading_flops=reading,
        cache_analytic=found["kv cache"].bytes / 2**20,
        block=most / 2**20,
        token=token / 2**20,
    )


def run_transformers(folder: Path, dtype: str, side: str, new_tokens: str) -> None:
    """transformers, dense: its own processor, vision tower, prefill with a cache, and greedy steps without generate's bookkeeping."""
    started = time.perf_counter()
    import torch
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), Qwen2VLImageProcessorPil.from_pretrained(folder)
    weights, loaded = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, time.perf_counter()
    image, steps, tower, watch = picture(int(side)), int(new_tokens), model.model.visual, {}
    forward = tower.forward

    def timed(*args, **kwargs):
        start = time.perf_counter()
        done = forward(*args, **kwargs)
        watch["vision"] = time.perf_counter() - start
        return done

    tower.forward = timed

    @torch.inference_mode()
    def request() -> dict[str, float]:
        start = time.perf_counter()
        pixels = processor(images=[image], return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        rows = int(pixels["image_grid_thw"].prod()) // 4
        ids = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * rows), return_tensors="pt")["input_ids"]
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels)
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        ready = time.perf_counter()
        done = model(**inputs, use_cache=True, logits_to_keep=1)
        token, prefilled, length = done.logits[:, -1].argmax(-1, keepdim=True), time.perf_counter(), ids.shape[1]
        for step in range(steps - 1):
            position = (model.model.rope_deltas + length + step).expand(3, 1, 1)
            done = model(input_ids=token, position_ids=position, past_key_values=done.past_key_values, use_cache=True)
            token = done.logits[:, -1].argmax(-1, keepdim=True)
        end = time.perf_counter()
        stages = dict(processing=ready - start, look=0.0, vision=watch["vision"], prefill=prefilled - ready - watch["vision"])
        return stages | dict(decode=end - prefilled, first=prefilled - start, total=end - start)

    request()
    serve(dict(load=loaded - started, first=time.perf_counter() - loaded, weights=weights), request)


WORKERS = {"ours": run_ours, "transformers": run_transformers}


def main(args: Args) -> int:
    """Runs it. Returns: exit status."""
    from benchmarks import random_model
    from gp_jax.runtime.progress import Progress

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print("writing a random model", file=sys.stderr)
        random_model.write(folder, args.size)
        size = (args.side, args.new_tokens)
        ours = {"look": (args.retention, args.look_share, args.seen), "pruned": (args.retention, 1.0, 1.0), "dense": (1.0, 1.0, 1.0)}
        ways = {name: ("ours", *own) for name, own in ours.items()} | {"transformers": ("transformers",)}
        field = []
        for dtype in args.dtypes:
            for name in args.contenders:
                worker, *more = ways[name]
                print(f"starting {name} {dtype}", file=sys.stderr)
                command = (f"{name} {dtype}", "benchmarks.generate", worker, folder, dtype, *more, *size)
                if worker == "ours":
                    Contender(*command).end()  # the first answer that counts finds compiled programs
                field.append(Contender(*command))
        roofline = Contender("roofline", "benchmarks.roofline")
        with Progress(total=len(field) * (args.rounds + 1), unit="request") as bar:
            interleave(field, args.rounds, progress=lambda name: (bar.set_description(name), bar.update()))
        ends = {contender.name: contender.end() for contender in field}
        roofline.end()
    report(args, field, ends, roofline.ready)
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "worker":
        name, *rest = sys.argv[2:]
        WORKERS[name](Path(rest[0]), *rest[1:])
    else:
        sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.generate")))
