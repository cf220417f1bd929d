"""Makes tables and the report of predictions."""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gp_jax.data.masks import inside
from gp_jax.errors import printable, reason
from gp_jax.evaluation.reporting.contact_sheet import write_sheet
from gp_jax.evaluation.reporting.cost_panel import panel, read_cost
from gp_jax.evaluation.reporting.exports import as_csv, as_json, grouped_csv, grouped_json
from gp_jax.evaluation.reporting.gallery import Example
from gp_jax.evaluation.reporting.html import write_report
from gp_jax.evaluation.reporting.line_links import Lines
from gp_jax.evaluation.reporting.plan_rows import aggregate, breakdown
from gp_jax.evaluation.reporting.tables import grouped_markdown, markdown, text
from gp_jax.evaluation.results import Prediction, line_numbers
from gp_jax.evaluation.runner import Runner
from gp_jax.evaluation.scores import main_metric
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.processing.images import decode
from gp_jax.runtime.disk import path_of, write_text, writing
from gp_jax.vlm import GlimpseVLM

SHOWN, SHEET = "glimpse", 6  # plan and number of samples on overlays.png
Found = Sequence[tuple[Runner, list[Prediction]]]


def in_order(predictions: Sequence[Prediction], names: Sequence[str]) -> list[Prediction]:
    """Predictions plan by plan, in the order in which the plans were named, not in which they ran."""
    return sorted(predictions, key=lambda p: names.index(p.plan))


def summarise(config: EvalConfig, vlm: GlimpseVLM, found: Found, more: Sequence[str] = ()) -> Path:
    """Prints the table; writes it, its parts by family or task, and the report. more: notes. Returns: the report's path."""
    out = path_of(config.out)
    names = list(dict.fromkeys(config.plans))
    everything = in_order([p for _, predictions in found for p in predictions], names)
    flops = {runner.task.name: runner.flops for runner, _ in found}

    known: dict[tuple[str, str, str], float] = {}

    def cost(prediction: Prediction) -> float:
        key = prediction.task, prediction.sample, prediction.plan
        if key not in known:
            known[key] = flops[prediction.task](prediction)
        return known[key]

    rows = aggregate(everything, cost, kv_bytes(vlm))
    by: Literal["family", "task"] = "family" if len(found) == 1 else "task"
    groups = breakdown(everything, by, cost, kv_bytes(vlm))
    metric, file = main_metric([runner for runner, _ in found]), found[0][0].path
    lines = Lines(everything, line_numbers(file), file, by)
    print(text(rows, metric) + times(everything))
    whole = {
        "table.md": markdown(rows, metric, lines),
        "table.csv": as_csv(rows, lines, metric),
        "table.json": as_json(rows, lines, metric),
    }
    parts = {
        f"by_{by}.md": grouped_markdown(groups, by, metric, lines),
        f"by_{by}.csv": grouped_csv(groups, by, lines, metric),
        f"by_{by}.json": grouped_json(groups, lines, metric),
    }
    for name, content in (whole | parts).items():
        write_text(out / name, content)
    path = path_of(config.report) if config.report else out / "report" / "index.html"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    samples, missing = gallery(config, found, metric, lines)
    saved = panel(read_cost(path_of(config.cost))) if config.cost else ""
    write_report(path, config.title, rows, groups, samples, [*notes(config, vlm, found), *more, *missing], lines, metric, saved)
    if SHOWN in names:
        write_sheet(out / "overlays.png", samples, SHOWN, SHEET)
    return path


def kv_bytes(vlm: GlimpseVLM):
    """A function from a prediction to the bytes of its key-value cache after pruning, for visual tokens only."""
    text = vlm.config.text
    token = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * vlm.model.decoder.embed_tokens.dtype.itemsize
    return lambda prediction: float(token * prediction.held)


def command(config: EvalConfig) -> str:
    """The command line that gives this configuration, without the options for processes and caches."""
    words = ["python eval.py"]
    for part, prefix in ((config, "--"), (config.judge, "--judge.")):
        for field in dataclasses.fields(part):
            value = config.judge.shown if part is config.judge and field.name == "url" else getattr(part, field.name)
            if field.name not in ("judge", "process", "title", "report", "cost", "compilation_cache") and value != field.default:
                words.append(f"{prefix}{field.name.replace('_', '-')}")
                words += map(shlex.quote, map(str, value if isinstance(value, tuple) else [value]))
    return " ".join(words)


def notes(config: EvalConfig, vlm: GlimpseVLM, found: Found) -> list[str]:
    """Notes for the report about what was run."""
    import jax

    layers = vlm.config.text.num_hidden_layers
    cut = f"cut after layer {vlm.glimpse_config.reduce_layer} of {layers} (counted from 0)" if vlm.glimpse_config else "no glimpse"
    settings = json.dumps({name: value for name, value in config.settings.items() if value not in (None, "", 0)})
    return [
        f"model: {config.model}, {cut}; glimpse: {config.glimpse or 'of the model folder'}"
        + (f"; adapter: {config.adapter}" if config.adapter else ""),
        f"tasks: {', '.join(config.tasks)}, at most {config.limit} records each from record {config.start}"
        + (f", scenes of seed {config.scenes_seed}" if config.scenes_seed else ""),
        f"metrics: {'; '.join(f'{runner.task.name} {runner.task.metrics[0]}' for runner, _ in found)}",
        f"command: {command(config)}",
        f"settings: {settings}",
        f"device: {jax.device_count()} x {jax.devices()[0].device_kind} in {jax.process_count()} process(es), batches of {config.batch}",
        times([p for _, predictions in found for p in predictions]),
    ]


def times(predictions: Sequence[Prediction]) -> str:
    """What is in the times, and what first calls took beside them."""
    untimed, spent = sum(not p.timed for p in predictions), sum(p.first_calls for p in predictions)
    left_out = f"; {untimed} of {len(predictions)} answers have no time without such a call and are left out" if untimed else ""
    return f"first calls: {spent:.1f} s of tracing, compiling and loading programs, in no other time{left_out}"


def gallery(config: EvalConfig, found: Found, metric: str, lines: Lines) -> tuple[list[Example], list[str]]:
    """The first samples of every task, alternating between families. An answer that scores half or more is shown as right.

    Returns: the samples whose pictures can be opened, and a note about each of the others.
    """
    samples, missing = [], []
    for runner, predictions in found:
        by_sample: dict[str, dict[str, Prediction]] = {}
        for prediction in in_order(predictions, list(dict.fromkeys(config.plans))):
            by_sample.setdefault(prediction.sample, {})[prediction.plan] = prediction
        for number, entry in enumerate(runner.task.entries[: config.pictures // len(found)]):
            own = by_sample.get(entry.id, {})
            if not own or not entry.sizes:
                continue
            first, processor = next(iter(own.values())), runner.vlm.processor
            try:
                picture = decode(runner.task.source[number].images[0], entry.id)
                moved = [inside(box, picture.size, processor.areas(*picture.size)[0]) for box in first.boxes]
                view = processor.views(picture)[0]
            except Exception as error:  # the picture was damaged after it was asked about
                missing.append(f"not in the gallery: {first.task}:{first.sample}, {reason(error)}")
                print(printable(missing[-1]))
                continue
            samples.append(
                Example(
                    question=first.question,
                    answer=first.answer,
                    family=first.family,
                    picture=view,
                    keeps={plan: p.mask() for plan, p in own.items()},
                    predictions={plan: p.prediction for plan, p in own.items()},
                    right={plan: p.metrics[metric] >= 0.5 for plan, p in own.items() if math.isfinite(p.metrics[metric])},
                    boxes=[box for box in moved if box],
                    task=first.task,
                    id=first.sample,
                    lines={plan: lines.numbers[p.key] for plan, p in own.items() if p.key in lines.numbers},
                )
            )
    return samples, missing
