"""The model card of a finished run, for the Hub: every figure in it is one that the run, or `eval.py`, has written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gp_jax.errors import GlimpseError, printable
from gp_jax.runtime.disk import kind_of, parse_json, read_json, read_text

GLIMPSE_FILES, ADAPTER_FILES = ("glimpse.safetensors", "new_modules_gp.pt"), ("adapter_config.json", "adapter_model.safetensors")
MOST_LINES = 1 << 28  # bytes of metrics.jsonl
GLIMPSE_FIELDS = (
    "reduce_layer",
    "selected_layers",
    "le_length",
    "selected_visual_layers",
    "attn_fuse_size",
    "visual_cond_size",
    "use_attention_logits",
    "reduce_threshold",
    "max_remain_ratio",
)
TRAIN_FIGURES = ("loss", "language", "dice", "bce", "samples_per_s", "memory_gib")
METRICS = "metrics.jsonl"


def exported(run: Path) -> tuple[str, list[Path]]:
    """What a run has exported: "glimpse" or "adapter", and the files to publish. Raises: GlimpseError when it has exported nothing."""
    folder = run / "export"
    for kind, names in (("glimpse", GLIMPSE_FILES), ("adapter", ADAPTER_FILES)):
        if kind_of(folder / names[0]) == "file":
            wanted = [folder / name for name in dict.fromkeys((*names, *(["config.json"] if kind == "glimpse" else [])))]
            if missing := [path.name for path in wanted if kind_of(path) != "file"]:
                raise GlimpseError(f"{folder}: {', '.join(missing)} is missing")
            return kind, wanted
    raise GlimpseError(
        f"{folder}: holds no glimpse and no adapter; a run writes it when it ends (the same command goes on with a stopped one)"
    )


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises: GlimpseError that names the line at fault."""
    path = run / METRICS
    found = []
    for number, line in enumerate(read_text(path, MOST_LINES).splitlines(), 1):
        try:
            fields = parse_json(line, f"line {number}")
        except ValueError as error:
            raise GlimpseError(f"{path}: {error}") from error
        if not isinstance(fields, dict) or type(fields.get("step")) is not int:
            raise GlimpseError(f"{path}: line {number} has no step")
        found.append(fields)
    return found


def base_of(config: Mapping[str, Any], given: str | None, where: Path) -> str:
    """The Hub id of a run's base. given: by the caller. Raises: GlimpseError when it is not known."""
    name = given or str(config.get("model", ""))
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or (given is None and kind_of(Path(name)) is not None):
        raise GlimpseError(f"{where}: model={printable(name, 200)} is no Hub id; say which model it is with --base OWNER/NAME")
    return name


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of name and value as Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def shown(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
    return printable(text, 200).replace("|", "\\|")


def figures(line: Mapping[str, Any], names: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """The numbers of a log line. names: which; None: all."""
    skipped = ("step", "group")
    own = {k: v for k, v in line.items() if k not in skipped and isinstance(v, int | float) and not isinstance(v, bool)}
    return [(name, shown(own[name])) for name in (names or own) if name in own]


def sources(data: Mapping[str, Any]) -> str:
    """Names of a run's data, without the folders above them."""

    def one(source: Mapping[str, Any]) -> str:
        path = str(source.get("path", ""))
        name = path if path.startswith("scenes:") else Path(path).name
        return f"{name} ({source.get('split', 'train')}, {source.get('sampling', 'all')})"

    return "; ".join(map(one, data.get("sources") or ()))


def model_card(run: Path, repository: str, *, base: str | None = None, license: str | None = None, evaluation: Path | None = None) -> str:
    """The card's text.

    Args: repository: OWNER/NAME on the Hub; base: Hub id of the base, where the run's config names a folder; license: of these weights;
        evaluation: folder of `eval.py`, whose table goes into the card.
    Raises: GlimpseError that names the file at fault.
    """
    kind, files = exported(run)
    config, environment, lines = read_json(run / "config.json"), read_json(run / "environment.json", required=False), log_lines(run)
    base = base_of(config, base, run / "config.json")
    trained = [line for line in lines if line.get("group") == "train"]
    checked = [line for line in lines if line.get("group") == "validation"]
    if not trained:
        raise GlimpseError(f"{run / METRICS}: has no line of training")
    optim, data = config.get("optim") or {}, config.get("data") or {}
    samples = f"{config.get('batch_size')} x {config.get('accumulation')} micro-batches"
    settings = [
        ("base", f"[{base}](https://huggingface.co/{base}), {config.get('dtype') or 'as stored'}, frozen"),
        ("data", shown(sources(data))),
        ("steps", f"{trained[-1]['step']}, each of {samples}"),
        ("learning rate", shown(f"{optim.get('learning_rate')}, {optim.get('name')}, {optim.get('schedule')}")),
        ("seed", shown(config.get("seed"))),
        ("code", shown(f"gp_jax {environment.get('gp_jax', 'unknown')}, revision {environment.get('git_revision')}")),
        ("devices", shown(environment.get("devices", "unknown"))),
    ]
    option = "glimpse" if kind == "glimpse" else "adapter"
    parts = [
        header(base, license, kind),
        f"# {printable(repository, 200)}\n",
        f"{'A GlimpsePrune glimpse' if kind == 'glimpse' else 'A LoRA adapter, fine-tuned under pruning,'} for [{base}]"
        f"(https://huggingface.co/{base}), trained with gp_jax ([method](https://arxiv.org/abs/2508.01548)). "
        "The base model is not part of it.\n",
        "```python\nfrom gp_jax import GlimpseVLM\n\n"
        f'vlm = GlimpseVLM.from_pretrained("{base}", {option}="{repository}", dtype="bfloat16")\n'
        'print(vlm.answer("photo.jpg", "What does the sign say?").text)\n```\n',
        f"## Training\n\n{table(settings)}\n",
        f"Last line of the log, step {trained[-1]['step']}:\n\n{table(figures(trained[-1], TRAIN_FIGURES) or figures(trained[-1]))}\n",
    ]
    if kind == "glimpse":
        glimpse = read_json(run / "export" / "config.json")
        parts.append(f"## Glimpse\n\n{table([(name, shown(glimpse.get(name))) for name in GLIMPSE_FIELDS])}\n")
    said = f"Validation at step {checked[-1]['step']}:\n\n{table(figures(checked[-1]))}" if checked else "The run had no validation."
    parts.append(f"## Results\n\n{said}\n")
    if evaluation is not None:
        written = read_text(evaluation / "table.md").strip().split("\n")
        alone = "\n".join(line for line in written if "](" not in line)  # links lead to files that are not published
        parts.append(f"`gp-jax eval`:\n\n{alone.strip()}\n")
    else:
        parts.append("Answers were not evaluated.\n")
    parts.append(
        f"Files: {', '.join(f'`{path.name}`' for path in files)}. This card was written by `gp-jax push` from the run's own files.\n"
    )
    return "\n".join(parts)


def header(base: str, license: str | None, kind: str) -> str:
    """The metadata that the Hub reads."""
    lines = [f"base_model: {base}", "library_name: gp_jax", "pipeline_tag: image-text-to-text"]
    lines += [f"license: {license}"] if license else []
    tags = "glimpseprune, visual-token-pruning, jax" + ("" if kind == "glimpse" else ", lora, peft")
    return "\n".join(["---", *lines, f"tags: [{tags}]", "---"])
