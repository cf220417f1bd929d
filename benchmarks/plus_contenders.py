"""The contenders of `benchmarks.plus_step`, each in a process of its own. A request is one step; beside it, what a pass for
log-probabilities alone takes, which a step needs only for a second update with the same completions."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.contenders import serve

REWARD = "benchmarks.plus_contenders:reward"
LEARNING_RATE = 1e-5


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing and differs within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def run_ours(folder: Path, masks: str) -> None:
    """gp_jax: the stage as `train.py` takes it. masks: of MasksConfig."""
    from gp_jax.runtime.allocator import keep_memory

    keep_memory()
    started = time.perf_counter()
    import numpy as np

    from benchmarks.contenders import resident
    from gp_jax.data.settings import DataConfig, DataSource
    from gp_jax.models.adapter import AdapterConfig
    from gp_jax.runtime.clock import COMPILES
    from gp_jax.training.plus.batches import Weighted, micro_batch
    from gp_jax.training.plus.questions import together
    from gp_jax.training.plus.rollouts import Rollout
    from gp_jax.training.plus.run import build_plus
    from gp_jax.training.plus.settings import MasksConfig, PlusConfig, PolicyConfig
    from gp_jax.training.plus.step import PlusStep
    from gp_jax.training.settings import OptimConfig
    from gp_jax.training.step import Counts

    args = json.loads((folder / "args.json").read_text())
    policy = PolicyConfig(
        group_size=args["group"], max_new_tokens=args["new_tokens"], beta=args["beta"], flat_groups="keep", cut_completions="keep"
    )
    config = PlusConfig(
        model=str(folder / "model"),
        data=DataConfig(sources=(DataSource(str(folder / "data"), rewards=(REWARD,)),), shapes=1),
        masks=MasksConfig(kind=masks),
        policy=policy,
        adapter=AdapterConfig(r=args["rank"], lora_alpha=2 * args["rank"]),
        optim=OptimConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_ratio=0.0),
        out=str(folder / masks),
        dtype="float32",
        batch_size=args["micro"],
        accumulation=args["questions"] // args["micro"],
        steps=1000,
        samples_every=0,
        remat=args["remat"],
    ).check()
    python = resident()
    run = build_plus(config, lambda items, *_: items)
    take, loaded = PlusStep(run, print), [run.feed.loader.map(number) for number in range(config.accumulation)]
    (state, gathered), number = run.step.start(), 0
    (bucket,) = together(loaded)  # shapes=1
    questions, parts = bucket.questions, bucket.parts

    # The same completions for everybody, whose log-probabilities are compared, and on which the pass alone is timed.
    roller, given = run.roller, np.load(folder / "completions.npy").reshape(args["questions"], args["group"], -1)
    asked = [json.loads(row)["question"] for row in (folder / "rows.jsonl").read_text().splitlines()]  # training shuffles them
    tokens = [own for question in questions for own in given[asked.index(question.record.question)]]
    drawn = roller.draw_masks(questions, 0)
    batch = roller.batch(questions, drawn)
    answers = Rollout(questions, drawn, batch, roller.engine.view(batch), tokens, [np.zeros(t.size) for t in tokens], [False] * len(tokens))
    ones = np.ones((len(tokens), run.slots), np.float32)
    built = [micro_batch(roller.engine, answers, members, config.batch_size, run.slots, Weighted(ones[:, 0], ones)) for members in parts]
    counts = Counts(np.float32(ones.size), np.float32(len(tokens)))

    def logprobs() -> np.ndarray:
        return np.concatenate([np.asarray(run.step.evaluate(state, each, counts)[1]) for each in built])

    ready, warm = dict(load=time.perf_counter() - started, python=python, logprob=float(logprobs().mean())), time.perf_counter()

    def request() -> dict[str, float]:
        nonlocal state, gathered, number
        start, spent = time.perf_counter(), time.process_time()
        taken = take(state, gathered, number, iter(loaded), lambda text: None, lambda: False)
        assert taken is not None, "nobody stops it"
        state, gathered, found = taken
        end, number, spent = time.perf_counter(), number + 1, time.process_time() - spent
        logprobs()
        stages = dict(rollout=found["rollout_s"], rewards=found["reward_s"], update=found["update_s"], logprobs=time.perf_counter() - end)
        ready.update(retention=float(found["retention"]), tokens=float(found["completion_tokens"]))
        return stages | dict(step=end - start, cpu=spent, compiled=found["compilations"], gap=float(found["rollout_gap"]))

    request()
    text = questions[0].sample.prompt.ids.size - questions[0].sample.prompt.count
    ready |= dict(first=time.perf_counter() - warm, text=text, compiled=COMPILES.count - COMPILES.read)
    serve(ready, request)


def run_torch(folder: Path, once: str) -> None:
    """transformers and PEFT. once: 1: the tower sees every picture once a step; 0: for every completion and pass, as `generate` and a
    model's forward do."""
    started = time.perf_counter()
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLForConditionalGeneration

    from benchmarks.contenders import resident
    from benchmarks.plus_torch import TorchStep

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    args, python = json.loads((folder / "args.json").read_text()), resident()
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    base.generation_config.eos_token_id = None  # -1 would do, with a warning for every step
    linear = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(base, LoraConfig(r=args["rank"], lora_alpha=2 * args["rank"], lora_dropout=0.0, target_modules=linear))
    step = TorchStep(model, folder, args, LEARNING_RATE, reward, once == "1")
    completions = torch.from_numpy(np.load(folder / "completions.npy")).long()
    ready = dict(load=time.perf_counter() - started, python=python, logprob=float(step.logprobs(completions).mean()))
    warm = time.perf_counter()

    def request() -> dict[str, float]:
        start, spent = time.perf_counter(), time.process_time()
        stages = step()
        end, spent = time.perf_counter(), time.process_time() - spent
        step.logprobs(completions)
        return stages | dict(step=end - start, cpu=spent, logprobs=time.perf_counter() - end)

    request()
    serve(ready | dict(first=time.perf_counter() - warm), request)


WORKERS = {"ours": run_ours, "torch": run_torch}

if __name__ == "__main__":
    WORKERS[sys.argv[2]](Path(sys.argv[3]), *sys.argv[4:])
