"""What pruning saves at the sizes of real pictures, beside an evaluation whose model is too small to show it.

The numbers are those of `python -m benchmarks.cost`, which writes them as JSON.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, PositiveFloat, ValidationError

from gp_jax.errors import GlimpseError
from gp_jax.evaluation.reporting.gallery import safe
from gp_jax.evaluation.reporting.tables import duration, size
from gp_jax.runtime.disk import read_json


class Measured(BaseModel, extra="forbid"):
    """Of one kind of request to the random model."""

    first_token_s: PositiveFloat
    per_token_s: PositiveFloat
    cache_bytes: PositiveFloat
    requests: int


class Computed(BaseModel, extra="forbid"):
    """Of one kind of request to 7B."""

    prefill_flops: PositiveFloat
    cache_bytes: PositiveFloat
    requests: int


class MeasuredRow(BaseModel, extra="forbid"):
    """A size of picture."""

    tokens: NonNegativeInt
    dense: Measured
    pruned: Measured


class ComputedRow(BaseModel, extra="forbid"):
    """A size of picture."""

    tokens: NonNegativeInt
    dense: Computed
    pruned: Computed


class Facts(BaseModel, extra="forbid"):
    """The file."""

    command: str
    machine: str
    size: str
    retention: PositiveFloat
    new_tokens: NonNegativeInt
    budget: PositiveFloat
    budget_7b: PositiveFloat
    measured: list[MeasuredRow]
    computed: list[ComputedRow]


Line = tuple[str, str, str, str, str]  # where, what, dense, pruned, pruned / dense


def read_cost(path: Path) -> Facts:
    """Raises: GlimpseError that names the file and its field."""
    try:
        return Facts.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise GlimpseError(f"{path}: {where}: {first['msg']}; python -m benchmarks.cost writes such a file") from error


def lines(facts: Facts) -> list[Line]:
    """The table's lines."""
    found: list[Line] = []

    def add(where: str, what: str, dense: float, pruned: float, shown: Any) -> None:
        found.append((where, what, shown(dense), shown(pruned), f"{pruned / dense:.0%}" if dense else "-"))

    for one in facts.measured:
        where = f"measured, {one.tokens:,} visual tokens"
        add(where, "time to first token", one.dense.first_token_s, one.pruned.first_token_s, duration)
        add(where, "time per token behind it", one.dense.per_token_s, one.pruned.per_token_s, duration)
        add(where, "KV cache of a request", one.dense.cache_bytes, one.pruned.cache_bytes, size)
        add(where, f"requests in {facts.budget:g} GiB", one.dense.requests, one.pruned.requests, "{:,.0f}".format)
    for row in facts.computed:
        where = f"computed, Qwen2.5-VL 7B, {row.tokens:,} visual tokens"
        add(where, "FLOPs to first token", row.dense.prefill_flops, row.pruned.prefill_flops, lambda flops: f"{flops / 1e12:.1f} TFLOP")
        add(where, "KV cache of a request", row.dense.cache_bytes, row.pruned.cache_bytes, size)
        add(where, f"requests in {facts.budget_7b:g} GiB", row.dense.requests, row.pruned.requests, "{:,.0f}".format)
    return found


def about(facts: Facts) -> str:
    """What was measured, and with which command."""
    return (
        f"One picture and question, {facts.retention:.1%} of the visual tokens kept, {facts.new_tokens} new tokens. "
        f"Measured: a model of random weights at the proportions of real ones (size {facts.size!r}) on {facts.machine}; "
        f"what first calls cost is left out. Requests: caches that fit beside the weights. Command: {facts.command}"
    )


def text(facts: Facts | dict) -> str:
    """For a terminal."""
    facts = Facts.model_validate(facts)
    table = [("", "", "dense", "pruned", "pruned / dense"), *lines(facts)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    shown, before = [], ""
    for where, *cells in table:
        first = where if where != before else ""
        before = where
        cells = [cells[0].ljust(widths[1]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[2:], strict=True))]
        shown.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join([*shown, about(facts)]) + "\n"


def panel(facts: Facts) -> str:
    """HTML for the page."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "", "dense", "pruned", "pruned / dense"))
    body, before = [], ""
    for where, what, *cells in lines(facts):
        first = safe(where) if where != before else ""
        before = where
        body.append(f'<tr><th scope="row">{first}</th><td>{safe(what)}</td>{"".join(f"<td>{safe(cell)}</td>" for cell in cells)}</tr>')
    return (
        '<h2 id="cost">What pruning saves at the sizes of real pictures</h2>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f'<p class="caption">{safe(about(facts))}. The model of this evaluation reads so few visual tokens that it cannot show a saving; '
        "docs/performance.md has more.</p>"
    )
