"""From predictions to tables and the report."""

import json
from collections.abc import Sequence
from pathlib import Path

from gp_jax.data.samples import decode
from gp_jax.evaluation.gallery import Sample
from gp_jax.evaluation.report import write_report
from gp_jax.evaluation.results import Prediction
from gp_jax.evaluation.rows import aggregate, breakdown
from gp_jax.evaluation.runner import Runner
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.evaluation.sheet import write_sheet
from gp_jax.evaluation.tables import as_csv, as_json, markdown, text
from gp_jax.vlm import GlimpseVLM

SHOWN, SHEET = "glimpse", 6  # the plan and the samples on overlays.png
Found = Sequence[tuple[Runner, list[Prediction]]]


def in_order(predictions: Sequence[Prediction], names: Sequence[str]) -> list[Prediction]:
    """Plan by plan as they were asked for, not as they ran."""
    return sorted(predictions, key=lambda p: names.index(p.plan))


def summarise(config: EvalConfig, vlm: GlimpseVLM, found: Found) -> Path:
    """Prints the table, writes table.md, table.csv, table.json and the report. Returns: the report's path."""
    out = Path(config.out)
    names = list(dict.fromkeys(config.plans))
    everything = in_order([p for _, predictions in found for p in predictions], names)
    flops = {runner.task.name: runner.flops for runner, _ in found}

    def cost(prediction: Prediction) -> float:
        return flops[prediction.task](prediction)

    rows = aggregate(everything, cost, kv_bytes(vlm))
    by = "family" if len(found) == 1 else "task"
    groups = breakdown(everything, by)
    print(text(rows))
    for name, write in (("table.md", markdown), ("table.csv", as_csv), ("table.json", as_json)):
        scratch = out / f".{name}.partial"
        scratch.write_text(write(rows))
        scratch.replace(out / name)
    path = Path(config.report) if config.report else out / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = gallery(config, found)
    write_report(path, config.title, rows, groups, samples, notes(config, vlm))
    if SHOWN in names:
        write_sheet(out / "overlays.png", samples[:SHEET], SHOWN)
    return path


def kv_bytes(vlm: GlimpseVLM):
    """Bytes of an answer's cache after pruning, of visual tokens alone."""
    text = vlm.config.text
    token = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * vlm.model.decoder.embed_tokens.dtype.itemsize
    return lambda prediction: float(token * prediction.held)


def notes(config: EvalConfig, vlm: GlimpseVLM) -> list[str]:
    """What was run."""
    import jax

    layers = vlm.config.text.num_hidden_layers
    cut = f"cut after layer {vlm.glimpse_config.reduce_layer} of {layers} (counted from 0)" if vlm.glimpse_config else "no glimpse"
    settings = json.dumps({name: value for name, value in config.identity().items() if value not in (None, "", 0)})
    return [
        f"model: {config.model}, {cut}; glimpse: {config.glimpse or 'of the model folder'}",
        f"tasks: {', '.join(config.tasks)}, {config.limit} records each from record {config.start}",
        f"command: python eval.py --model {config.model} --tasks {' '.join(config.tasks)} --limit {config.limit} --start {config.start}",
        f"settings: {settings}",
        f"device: {jax.device_count()} x {jax.devices()[0].device_kind}, batches of {config.batch}; compilation is not in the times",
    ]


def gallery(config: EvalConfig, found: Found) -> list[Sample]:
    """The first samples of every task, families in turn."""
    samples = []
    for runner, predictions in found:
        by_sample: dict[str, dict[str, Prediction]] = {}
        for prediction in in_order(predictions, list(dict.fromkeys(config.plans))):
            by_sample.setdefault(prediction.sample, {})[prediction.plan] = prediction
        for number, entry in enumerate(runner.task.entries[: config.pictures // len(found)]):
            own = by_sample.get(entry.id, {})
            if not own:
                continue
            record = runner.task.source[number]
            first = next(iter(own.values()))
            samples.append(
                Sample(
                    question=first.question,
                    answer=first.answer,
                    family=first.family,
                    picture=decode(record.images[0], record.id),
                    keeps={plan: p.mask() for plan, p in own.items()},
                    predictions={plan: p.prediction for plan, p in own.items()},
                    right={plan: p.metrics["exact_match"] == 1 for plan, p in own.items()},
                )
            )
    return samples
