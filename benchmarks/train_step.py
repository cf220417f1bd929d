"""Time and memory of a training step, here and in torch: python -m benchmarks.train_step [--size tiny|mid|large] [--samples 2] [--steps 5]

A random model is written by transformers; each framework loads it in a process of its own (so that memory peaks are separate),
with all cores, and takes AdamW steps on the same batch in float32. The torch side is `tests/torch_trainer.py`, the released way:
the whole sequence in one forward pass, sample by sample, autograd through everything behind the first glimpse row. It runs twice,
as it comes and with the allocator settings that gp_jax starts itself with.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gp_jax.runtime.allocator import TUNABLES

ROOT = Path(__file__).resolve().parents[1]
IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = range(90, 96)
TEXT, ANSWER = 40, 8  # tokens of a sample's prompt (half before, half behind the picture) and of its answer
WARM_UP = 2  # steps before the clock starts
AGREEMENT = 1e-4
SIZES = {
    "tiny": dict(
        text=dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=96),
        vision=dict(hidden_size=24, depth=4, num_heads=2, out_hidden_size=32, intermediate_size=40, fullatt_block_indexes=[1, 3]),
        rope=[1, 1, 2],
        glimpse=dict(selected_layers=[1], reduce_layer=1, selected_visual_layers=[3, 1], attn_fuse_size=16, visual_cond_size=16),
        side=8,
    ),
    "mid": dict(
        text=dict(
            hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=2048, vocab_size=4096
        ),
        vision=dict(hidden_size=256, depth=8, num_heads=4, out_hidden_size=512, intermediate_size=1024, fullatt_block_indexes=[3, 7]),
        rope=[8, 12, 12],
        glimpse=dict(selected_layers=[7], reduce_layer=7, selected_visual_layers=[7, 3], attn_fuse_size=128, visual_cond_size=256),
        side=16,  # of a picture, in visual tokens: 448 pixels
    ),
    "large": dict(
        text=dict(
            hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, vocab_size=4096
        ),
        vision=dict(hidden_size=512, depth=12, num_heads=8, out_hidden_size=896, intermediate_size=2048, fullatt_block_indexes=[5, 11]),
        rope=[8, 12, 12],
        glimpse=dict(selected_layers=[15], reduce_layer=15, selected_visual_layers=[11, 5], attn_fuse_size=256, visual_cond_size=512),
        side=28,
    ),
}


@dataclass(frozen=True)
class Benchmark:
    """Compare a training step with the same step in torch."""

    size: Literal["tiny", "mid", "large"] = "mid"
    """Of the model and its pictures."""
    samples: int = 2
    """Samples of a step."""
    steps: int = 5
    """Timed steps; the median counts."""


def make(folder: Path, size: str, samples: str) -> None:
    """Writes model, glimpse and batch."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    import tiny_models as tiny
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes, count = SIZES[size], int(samples)
    text = sizes["text"] | dict(bos_token_id=PAD, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False)
    text["rope_parameters"] = dict(rope_theta=1e6, rope_type="default", mrope_section=sizes["rope"])
    tokens = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sizes["vision"] | dict(patch_size=14, window_size=112), **tokens)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config).float()
    model.save_pretrained(folder / "base")
    glimpse = tiny.GLIMPSE | sizes["glimpse"] | dict(le_layers=list(range(text["num_hidden_layers"])))
    shapes = dict(text_size=text["hidden_size"], heads=text["num_attention_heads"], vision_size=sizes["vision"]["hidden_size"])
    tiny.save_glimpse(folder / "glimpse", model, glimpse, tiny.glimpse_weights(glimpse, **shapes))
    (folder / "glimpse.json").write_text(json.dumps(glimpse))
    random, side = np.random.default_rng(0), sizes["side"]
    ids = random.integers(0, IMAGE, (count, TEXT + ANSWER))
    picture = np.tile([VISION_START, *[IMAGE] * side**2, VISION_END], (count, 1))
    np.savez(
        folder / "batch.npz",
        ids=np.concatenate([ids[:, : TEXT // 2], picture, ids[:, TEXT // 2 :]], axis=1),
        pixels=random.normal(size=(count, 4 * side**2, 3 * 2 * 14 * 14)).astype(np.float32),
        grid=np.array([[1, 2 * side, 2 * side]]),
        reference=random.random((count, side**2)) < 0.2,
    )
    print("{}")


def measure(step: Callable[[], float], steps: int) -> None:
    """Runs steps that return their loss; prints what came out."""
    losses, seconds = [], []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
    print(json.dumps(dict(seconds=statistics.median(seconds[WARM_UP:]), loss=losses[0], peak=peak)))


def run_jax(folder: Path, steps: str) -> None:
    """gp_jax: the two programs of a step, accumulate and update."""
    from gp_jax.runtime.allocator import keep_memory

    keep_memory()
    import jax
    import numpy as np

    from gp_jax import GlimpseVLM
    from gp_jax.data.collate import TrainSample, lengths, train_batch
    from gp_jax.processing.layout import read_samples
    from gp_jax.training.optim import learning_rate, optimizer
    from gp_jax.training.settings import LossConfig, OptimConfig
    from gp_jax.training.step import Counts, TrainingStep

    vlm, batch = GlimpseVLM.from_pretrained(folder / "base", glimpse=folder / "glimpse"), np.load(folder / "batch.npz")
    samples = []
    for ids, pixels, reference in zip(batch["ids"], batch["pixels"], batch["reference"], strict=True):
        prompt = read_samples(vlm.config, ids[None, :-ANSWER], None, pixels, batch["grid"])[0]
        samples.append(TrainSample(prompt, ids[-ANSWER:], reference))
    rows = vlm.glimpse_config.rows
    shape = lengths(samples[0].prompt.slots.size, samples[0].prompt.ids.size, ANSWER, rows)
    arrays = train_batch(samples, vlm.config, len(samples), shape, rows, range(len(samples)))
    counts = Counts(np.float32(ANSWER * len(samples)), np.float32(len(samples)))
    optim = OptimConfig(schedule="constant", warmup_ratio=0.0)
    training = TrainingStep(vlm.model, optimizer(optim, 1000), learning_rate(optim, 1000), LossConfig())
    state, gathered = training.start()

    def step() -> float:
        nonlocal state, gathered
        gathered = training.accumulate(gathered, state, arrays, counts)
        state, gathered, metrics = training.update(state, gathered)
        jax.block_until_ready((state, gathered))
        return float(metrics["loss"])

    measure(step, int(steps))


def run_torch(folder: Path, steps: str) -> None:
    """torch: forward, backward, clip, AdamW."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    import torch
    from torch_trainer import Example, TorchTrainer
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32).train()
    weights = torch.load(folder / "glimpse" / "new_modules_gp.pt", weights_only=True)
    trainer = TorchTrainer(model, json.loads((folder / "glimpse.json").read_text()), weights)
    batch = {name: torch.from_numpy(array) for name, array in np.load(folder / "batch.npz").items()}
    examples = [
        Example(ids, ids.numel() - ANSWER, pixels, batch["grid"], reference)
        for ids, pixels, reference in zip(batch["ids"], batch["pixels"], batch["reference"], strict=True)
    ]
    parameters = list(trainer.parameters.values())
    adamw = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def step() -> float:
        adamw.zero_grad()
        losses = trainer.gradients(examples)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        return float(losses.loss)

    measure(step, int(steps))


WORKERS = {"make": make, "jax": run_jax, "torch": run_torch}


def start(worker: str, folder: Path, *args: object, **environment: str) -> dict:
    """Runs a worker in a process of its own. Returns: the JSON object that it printed last."""
    command = [sys.executable, "-m", "benchmarks.train_step", worker, str(folder), *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"benchmarks.train_step: the {worker} process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Entry point. Returns: 1 when the two do not compute the same loss."""
    if len(sys.argv) > 1 and sys.argv[1] in WORKERS:
        WORKERS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
        return 0
    import tyro

    args = tyro.cli(Benchmark, prog="python -m benchmarks.train_step")
    with tempfile.TemporaryDirectory() as scratch:
        start("make", Path(scratch), args.size, args.samples)
        load = os.getloadavg()[0]
        results = {
            "gp_jax": start("jax", Path(scratch), args.steps),
            "torch": start("torch", Path(scratch), args.steps),
            "torch, same allocator": start("torch", Path(scratch), args.steps, GLIBC_TUNABLES=TUNABLES),
        }
    cores, loads = len(os.sched_getaffinity(0)), (load, os.getloadavg()[0])
    visual, ours = SIZES[args.size]["side"] ** 2, results["gp_jax"]
    print(f"{args.size}: {args.samples} samples a step, each {visual} visual + {TEXT + 2} text + {ANSWER} answer tokens, float32")
    print(f"{cores} cores, load {loads[0]:.1f} before and {loads[1]:.1f} after; median of {args.steps} steps")
    if max(loads) > cores + 0.5:
        print("the machine was busy: torch's threads wait for each other then, so these ratios flatter gp_jax", file=sys.stderr)
    print(f"{'':22}{'s/step':>10}{'samples/s':>12}{'gp_jax is':>12}{'peak RSS MiB':>15}{'first loss':>13}")
    for name, r in results.items():
        speed, ratio = args.samples / r["seconds"], f"{r['seconds'] / ours['seconds']:.2f} x"
        print(f"{name:22}{r['seconds']:10.4f}{speed:12.2f}{ratio:>12}{r['peak']:15.0f}{r['loss']:13.6f}")
    if not all(abs(ours["loss"] - r["loss"]) <= AGREEMENT for r in results.values()):
        print(f"the losses differ by more than {AGREEMENT}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
