"""Reports a compiled generation as text and as JSON."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from gp_jax.ahead.compiling import DECODE, GIB, PREFILL, VISION, Program
from gp_jax.ahead.generation import Compiled, GenerationReport
from gp_jax.ahead.passes import Request

READING = "vision and prefill"
COUNTED = (VISION, PREFILL, DECODE)  # choosing the first token takes negligible work


def parts(plan: Compiled, programs: dict[str, Program]) -> dict[str, list[tuple[Program, int]]]:
    """The programs of a plan by stage, each with its number of runs."""
    return {stage: [(programs[name], runs) for name, runs in plan.runs.items() if programs[name].stage == stage] for stage in COUNTED}


def totals(generation: GenerationReport, name: str) -> dict[str, dict[str, float]]:
    """Per stage: FLOPs and bytes of all chips, as counted by XLA and computed from sizes, and bytes that a chip sends to others."""
    plan, chips = generation.plans[name], 1
    for size in generation.mesh.values():
        chips *= size
    table = {}
    for stage, programs in parts(plan, {p.name: p for p in generation.programs}).items():
        keys = ("vision", "merger") if stage == VISION else (stage,)
        table[stage] = {
            "flops_xla": chips * sum(p.flops * runs for p, runs in programs),
            "flops_sizes": sum(plan.sizes[key].flops for key in keys),
            "bytes_xla": chips * sum(p.bytes * runs for p, runs in programs),
            "bytes_sizes": sum(plan.sizes[key].bytes for key in keys),
            "sent": sum(sum(p.facts.collectives.values()) * runs for p, runs in programs),
        }
    return table


def ratios(generation: GenerationReport) -> dict[str, dict[str, float]]:
    """Costs of the first plan divided by those of the dense one, per stage; empty unless both were compiled. Vision: with a look, which
    alone changes it; then also vision and prefill together."""
    first = next(iter(generation.plans))
    if first == "dense":
        return {}
    pruned, dense = (totals(generation, name) for name in (first, "dense"))
    if first == "look":
        for table in (pruned, dense):
            table[READING] = {k: table[VISION][k] + table[PREFILL][k] for k in table[VISION]}
    found = {s: {k: pruned[s][k] / dense[s][k] for k in dense[s] if dense[s][k]} for s in dense if s != VISION or first == "look"}
    return found | {"kv cache": {"bytes": generation.plans[first].cache / generation.plans["dense"].cache}}


def table(programs: Sequence[Program], runs: Mapping[str, str]) -> Iterator[str]:
    """Programs, a line each. runs: by name, how often it runs."""
    width = max(len(p.name) for p in programs)
    heads = f"{'compile s':>10}{'args':>8}{'temp':>8}{'output':>8}{'GFLOP':>10}{'GB':>8}{'sent MB':>9}  attention"
    yield f"{'program':<{width}}{'runs':>10}{heads}"
    for p in programs:
        sizes = "".join(f"{size / GIB:>8.2f}" for size in (p.arguments, p.temporary, p.outputs))
        work = f"{p.flops / 1e9:>9.1f}{'+' if p.facts.loops else ' '}{p.bytes / 1e9:>8.2f}{sum(p.facts.collectives.values()) / 1e6:>9.1f}"
        yield f"{p.name:<{width}}{runs[p.name]:>10}{p.seconds:>10.1f}{sizes}{work}  {p.attention}"
    yield (
        "One run on one chip: GiB of arguments, temporary, outputs; FLOPs and bytes by XLA, which counts no kernels (+: loop bodies once)."
    )


def _stages(generation: GenerationReport) -> Iterator[str]:
    compared = ratios(generation)
    tables = {name: totals(generation, name) for name in generation.plans}
    lines = [["TFLOP by XLA", "TFLOP from sizes", "GB by XLA", "GB from sizes"]]
    for stage in next(iter(tables.values())):
        line = []
        for key, scale in (("flops_xla", 1e12), ("flops_sizes", 1e12), ("bytes_xla", 1e9), ("bytes_sizes", 1e9)):
            values = " / ".join(f"{table[stage][key] / scale:.2f}" for table in tables.values())
            ratio = compared.get(stage, {}).get(key)
            line.append(values + (f" {ratio:.1%}" if ratio else ""))
        lines.append(line)
    widths = [max(map(len, column)) + 3 for column in zip(*lines, strict=True)]  # three plans need more room than two
    for name, line in zip(("all chips", *next(iter(tables.values()))), lines, strict=True):
        yield f"{name:<18}" + "".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
    if READING in compared:
        said = ", ".join(f"{compared[READING][key]:.1%} {words}" for key, words in (("flops_xla", "by XLA"), ("flops_sizes", "from sizes")))
        yield f"{READING}, of dense: FLOPs {said}"
    caches = " / ".join(f"{plan.cache / GIB:.3f}" for plan in generation.plans.values())
    less = f" ({compared['kv cache']['bytes']:.1%})" if compared else ""
    yield f"{' / '.join(generation.plans)}; keys and values on a chip: {caches} GiB{less}"


def verdict(generation: GenerationReport) -> str:
    """A line that says whether the programs fit the memory."""
    return generation.verdict(f"weights {generation.weights / GIB:.2f}")


def attention(generation: GenerationReport) -> str:
    """A line about attention: whether any program stores scores of rows x rows."""
    with_splash = sum(p.facts.splash > 0 for p in generation.programs)
    largest, squares = (max(getattr(p.facts, name) for p in generation.programs) for name in ("largest", "squares"))
    stored = f"{squares / GIB:.2f} GiB of rows x rows ARE STORED" if squares else "no array of rows x rows"
    return (
        f"attention: splash in {with_splash} programs; {stored}; the largest array computed takes {largest / GIB:.2f} GiB, "
        f"the prompt's scores would take {generation.scores / GIB:.2f}"
    )


def text(generation: GenerationReport, request: Request, model: str, topology: str, dtype: str) -> str:
    """The whole report as text."""
    mesh = " ".join(f"{axis}={size}" for axis, size in generation.mesh.items())
    lengths = ", ".join(f"{name} {size}" for name, size in generation.lengths.items())
    samples = f"{request.batch} x ({request.visual_tokens} visual + {request.prompt_tokens} text) tokens"
    split = generation.mesh["data"] * generation.mesh["fsdp"]
    lines = [f"{model} in {dtype}, {samples}, {request.retention:.1%} kept, on {topology} ({mesh}); padded to {lengths}"]
    if "look" in generation.plans:
        lines.append(f"look: first at {request.look_share:.1%} of the visual tokens, then at {request.seen:.1%} of the windows")
    if generation.lengths["batch"] % split:
        lines.append(
            f"a batch of {generation.lengths['batch']} does not divide over data x fsdp = {split}: every chip computes all samples"
        )
    runs = {p.name: "/".join(str(plan.runs.get(p.name, 0)) for plan in generation.plans.values()) for p in generation.programs}
    lines += [
        "",
        *table(generation.programs, runs),
        f"Runs: {' / '.join(generation.plans)}.",
        "",
        *_stages(generation),
        "",
        attention(generation),
    ]
    spent = f"{generation.seconds:.0f} s ({generation.cpu_seconds:.0f} s of processor time)"
    lines.append(f"compiled {len(generation.programs)} programs in {spent}")
    return "\n".join([*lines, verdict(generation)])


def facts(generation: GenerationReport, request: Request, model: str, topology: str, dtype: str) -> dict:
    """The whole report as JSON values."""
    return {
        "model": model,
        "topology": topology,
        "dtype": dtype,
        "request": dataclasses.asdict(request),
        "mesh": generation.mesh,
        "lengths": generation.lengths,
        "seconds": generation.seconds,
        "cpu_seconds": generation.cpu_seconds,
        "weights": generation.weights,
        "needed": generation.needed,
        "hbm": generation.hbm,
        "fits": generation.fits,
        "programs": [
            dataclasses.asdict(p) | {"runs": {k: v.runs.get(p.name, 0) for k, v in generation.plans.items()}} for p in generation.programs
        ],
        "stages": {name: totals(generation, name) | {"kv cache": plan.cache} for name, plan in generation.plans.items()},
        "pruned over dense": ratios(generation),
        "prompt_scores": generation.scores,
    }
