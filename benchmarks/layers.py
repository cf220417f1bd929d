"""Unrolled, scanned or a program per kind of layer? python -m benchmarks.layers [--rows 512] [--layers 12]

The decoder of a random model in three forms: `unrolled`, all layers in one program; `scanned`, one program whose loop slices the stacked
weights; `by layer`, what the engine does: one program for all equal layers, called once per layer. Each runs in a process of its own.
Seconds are of the processor (all threads), which neighbours on the machine disturb less than the clock's.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

FORMS = ("unrolled", "scanned", "by layer")


@dataclass(frozen=True)
class Args:
    """Time and memory of prefill and of decoding."""

    layers: int = 12
    """Decoder layers."""
    width: int = 512
    """Decoder width, a multiple of 64; heads of 64, the MLP four times as wide."""
    rows: int = 512
    """Prompt tokens."""
    tokens: int = 32
    """Decoded tokens."""
    repeats: int = 5
    """Runs; the median counts."""
    form: Literal["all", "unrolled", "scanned", "by layer"] = "all"
    """One form, or a table of all."""


def peak_mb() -> float:
    """Most memory that the process had, MB, since `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> float:
    """Starts counting anew. Returns: memory now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def measure(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of the first call less a later one (compilation), of a later one, and memory on top of what was there."""
    import jax

    before, times = forget_peak(), []
    for _ in range(repeats + 1):
        start = time.process_time()
        jax.block_until_ready(run())
        times.append(time.process_time() - start)
    later = sorted(times[1:])[repeats // 2]
    return {"compile": times[0] - later, "run": later, "memory": peak_mb() - before}


def one(args: Args) -> dict[str, dict[str, float]]:
    """Measures one form. Outputs of all forms are compared by their sums."""
    from gp_jax.runtime.allocator import keep_memory

    keep_memory()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from gp_jax import pipeline
    from gp_jax.config.model import ModelConfig, TextConfig
    from gp_jax.config.vision import VisionConfig
    from gp_jax.inference import sampling
    from gp_jax.inference.requests import sampling_settings
    from gp_jax.inference.shared_programs import Parts
    from gp_jax.models.lvlm import LVLM
    from gp_jax.pipeline import prefill_layer
    from gp_jax.trees import LayerKV, Prefix, Stream

    heads, depth = args.width // 64, args.layers
    text = TextConfig(4096, args.width, 4 * args.width, depth, heads, max(1, heads // 4), 1e-6, 1e6, (8, 12, 12))
    config = ModelConfig("qwen2_5_vl", VisionConfig(1, 64, 64, 2, args.width, ()), text, image_token_id=1)
    model = LVLM(config, None, rngs=nnx.Rngs(0))
    shape, flat = (1, args.rows), jnp.full((1, args.rows), -1)
    positions = jnp.broadcast_to(jnp.arange(args.rows), (3, *shape))
    hidden = jax.random.normal(jax.random.key(1), (*shape, args.width))
    stream = Stream(hidden, positions, jnp.ones(shape, bool), flat, flat, jnp.zeros(1, int), (), {})
    graph, state = nnx.split(model)
    layer_graph = nnx.split(model.decoder.layers[0])[0]
    stacked = None
    if args.form == "scanned":
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *(nnx.split(layer)[1] for layer in model.decoder.layers))

    def scan_prefill(stacked, stream):
        angles = model.decoder.angles(stream.positions)

        def body(x, weights):
            x, key, value = prefill_layer(nnx.merge(layer_graph, weights), x, angles, stream.valid, "auto")
            return x, (key, value)

        return jax.lax.scan(body, stream.hidden, stacked)

    def scan_advance(stacked, rest, keys, values, valid, state, settings):
        model = nnx.merge(graph, rest)

        def step(state):
            positions = jnp.broadcast_to(state.next_position[None, :, None], (3, 1, 1))
            angles, x = model.decoder.angles(positions), model.decoder.embed(state.last[:, None])

            def body(x, layer):
                weights, key, value, new = layer
                return nnx.merge(layer_graph, weights).decode(x, angles, LayerKV(key, value, valid), new, state.cursor, state.written)

            x, new = jax.lax.scan(body, x, (stacked, keys, values, state.new_kv))
            slot = (state.cursor + 1) % state.tokens.shape[1]
            fed = dataclasses.replace(state, next_position=state.next_position + 1, cursor=slot, new_kv=new)
            return sampling.write(fed, model.decoder.logits(x[:, 0]), settings)

        return jax.lax.while_loop(lambda s: ~jnp.all(s.done), step, state)

    parts, found = Parts(), {}
    unrolled = jax.jit(lambda state, stream: pipeline.run(nnx.merge(graph, state), stream, 0, depth))
    scanned = jax.jit(scan_prefill)
    prefill = {
        "unrolled": lambda: unrolled(state, stream),
        "scanned": lambda: scanned(stacked, stream),
        "by layer": lambda: pipeline.run(model, dataclasses.replace(stream, hidden=stream.hidden.copy()), 0, depth, call=parts),
    }[args.form]
    found["prefill"] = measure(prefill, args.repeats)
    done = prefill()
    settings = sampling_settings(config, 0.0, 0, 1.0, 0, None)
    prefix = Prefix((), jnp.ones((1, 4096)), np.full(1, args.rows, np.int32))
    first = parts(sampling.start, model, prefix, settings, np.ones(1, bool), np.int32(args.tokens), slots=args.tokens)
    if args.form == "scanned":
        hidden, (keys, values) = done
        first = type(first)(**{**vars(first), "new_kv": jax.tree.map(lambda *a: jnp.stack(a), *first.new_kv)})
        rest, advance = nnx.split(model)[1], jax.jit(scan_advance)
        found["decode"] = measure(lambda: advance(stacked, rest, keys, values, stream.valid, first, settings), args.repeats)
        tokens = advance(stacked, rest, keys, values, stream.valid, first, settings).tokens
    else:
        hidden = done.hidden
        found["decode"] = measure(lambda: parts(sampling.advance, model, done.kv, first, settings, np.int32(args.tokens)), args.repeats)
        tokens = parts(sampling.advance, model, done.kv, first, settings, np.int32(args.tokens)).tokens
    return found | {"check": {"hidden": float(jnp.abs(hidden).mean()), "tokens": int(tokens.sum())}}


def main(args: Args) -> None:
    """A table, a process per form."""
    if args.form != "all":
        print(json.dumps(one(args)))
        return
    sizes = [f"--{name}={getattr(args, name)}" for name in ("layers", "width", "rows", "tokens", "repeats")]
    rows = {}
    for form in FORMS:
        print(f"measuring {form} ...", file=sys.stderr)
        argv = [sys.executable, "-m", "benchmarks.layers", *sizes, "--form", form]
        rows[form] = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(f"{args.layers} layers, {args.width} wide, float32; prefill of {args.rows} rows, {args.tokens} decoded tokens")
    print(f"{'':<12}" + "".join(f"{stage + ': ' + what:>20}" for stage in ("prefill", "decode") for what in ("compile s", "run s", "MB")))
    for form, row in rows.items():
        values = [row[stage][what] for stage in ("prefill", "decode") for what in ("compile", "run", "memory")]
        print(f"{form:<12}" + "".join(f"{value:>20.2f}" for value in values))
    print("by layer, decoding is one unrolled program too; same results:", {form: row["check"] for form, row in rows.items()})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
