"""From public annotation files to a TFDS folder: checked, sharded, resumable, by several processes.

The output folder while work goes on: `prepare.json` (what is being prepared), `parts/` with, per chunk of source rows and split, a shard
and its index, and per chunk a sidecar with its report, written last: a chunk with a sidecar is done. At the end parts get their final
names, so nothing is copied. Chunks depend on the sources alone; so the result is the same for any number of processes and however often
the work was interrupted.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gp_jax.data import builder
from gp_jax.data.formats import FRAME_NAMES, SPLIT_NAME
from gp_jax.data.report import KEPT, Report
from gp_jax.data.sources import Chunk, cut, find_files, scan
from gp_jax.data.work import Job, finish_all, part_path, sidecar_path
from gp_jax.errors import GlimpseError

ROWS_PER_SHARD = 512  # at most; about 100 MB of photographs
SHARDS_WANTED = 64  # of small sets, for several processes to share
ROWS_WORTH_A_WORKER = 500  # a process takes as long to start as hundreds of rows take
FORMAT = 1  # changes when the same rows would give other bytes
STATE = "prepare.json"
OURS = re.compile(rf"{builder.NAME}-.*\.{builder.SUFFIX}-.*|index-.*\.jsonl|(report|features|dataset_info)\.(json|txt)|.*\.partial|\.lock")


@dataclass(frozen=True)
class _Plan:
    """What is to be made of which rows."""

    job: Job
    out: Path
    chunks: tuple[Chunk, ...]
    state: dict  # what must be equal for work to be resumed

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)


def prepare(
    sources: Sequence[str | Path],
    images: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    boxes: str = "auto",
    workers: int | None = None,
    max_bad_share: float = 0.1,
    rows_per_shard: int | None = None,
    offenders: int = 5,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Checks annotation rows and writes those that are good as a TFDS folder.

    Args:
      sources: annotation files, or folders with them (formats.py lists the formats). images: the folder of pictures.
      out: a new folder, or one where the same preparation was interrupted: it goes on, or, when finished, only reports.
      split: for all rows, instead of each row's own `split` (or "train").
      boxes: what box numbers of 'your own' rows mean: "auto" (each row's box_format), "pixel", "normalized" or "0-1000".
      workers: processes; default: one per core, fewer for small sets. max_bad_share: of all rows; once more are bad, work stops.
      rows_per_shard: source rows; default: 512, fewer for small sets. offenders: shown per reason, at most 20.
      overwrite: start afresh in a folder that holds another preparation.
    Returns: counts and first offenders; also in report.json and report.txt.
    Raises: GlimpseError before work for missing or unreadable sources and settings, after it for too many bad rows.
    """
    _check_settings(split, boxes, workers, max_bad_share, rows_per_shard, offenders)
    plan = _make_plan(sources, images, out, split, boxes, rows_per_shard)
    with _locked(plan.out):
        finished = _resume(plan, overwrite)
        allowed = max_bad_share * plan.rows
        if finished:
            report = _finished_report(plan.out)
        else:
            finish_all(plan.job, plan.chunks, workers or min(_cores(), 1 + plan.rows // ROWS_WORTH_A_WORKER), allowed, progress)
            report = Report.merged((Report.from_dict(sidecar["report"]) for sidecar in _sidecars(plan)), plan.rows)
        with _writing(plan.out):
            _write(plan.out / "report.txt", report.text(offenders) + "\n")
            _write(plan.out / "report.json", json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
        if report.bad > allowed or not report.good:
            raise TooManyBad(report, max_bad_share, plan.out)
        with _writing(plan.out):
            if not finished:
                _finalise(plan)
            shutil.rmtree(plan.job.parts, ignore_errors=True)
    return report


class TooManyBad(GlimpseError):
    """The share of bad rows is above the limit. `report` has the facts."""

    def __init__(self, report: Report, limit: float, out: Path) -> None:
        self.report = report
        reason, tally = max(report.reasons.items(), key=lambda item: item[1].count)
        facts = f"(most: {reason}, {tally.count}, first at {tally.first[0][0]}); see {out / 'report.txt'}"
        if report.good or report.total < report.rows:
            part = "" if report.total == report.rows else f" among the first {report.total}"
            super().__init__(
                f"{report.bad} of {report.rows} rows are bad{part}, --max-bad-share {limit:g} allows fewer {facts}. "
                "Raise the share to go on from here, or mend the data and pass --overwrite"
            )
        else:
            super().__init__(f"all {report.bad} rows are bad {facts}, mend the data and pass --overwrite")


def _check_settings(
    split: str | None, boxes: str, workers: int | None, max_bad_share: float, rows_per_shard: int | None, offenders: int
) -> None:
    if split is not None and not SPLIT_NAME.fullmatch(split):
        raise GlimpseError(f"--split {split!r} must be a word of letters, digits and _, and not 'all'")
    if boxes not in FRAME_NAMES:
        raise GlimpseError(f"--boxes {boxes} is not one of auto, pixel, normalized, 0-1000")
    if not 0 <= max_bad_share <= 1:
        raise GlimpseError(f"--max-bad-share {max_bad_share} is not in 0..1")
    for name, value in (("workers", workers), ("rows-per-shard", rows_per_shard)):
        if value is not None and value < 1:
            raise GlimpseError(f"--{name} {value} is less than 1")
    if not 0 <= offenders <= KEPT:
        raise GlimpseError(f"--offenders {offenders} is not in 0..{KEPT}")


def _make_plan(
    sources: Sequence[str | Path], images: str | Path, out: str | Path, split: str | None, boxes: str, rows_per_shard: int | None
) -> _Plan:
    if "://" in str(out):
        raise GlimpseError(f"--out {out}: shards are written to a local folder; copy it when it is finished")
    images, out = Path(images), Path(out)
    files = find_files(sources)
    if not images.is_dir():
        raise GlimpseError(f"--images {images}: {'is not a folder' if images.exists() else 'no such folder'}")
    if out.exists() and not out.is_dir():
        raise GlimpseError(f"--out {out}: is not a folder")
    pieces, digest = scan(files)
    rows = sum(len(piece.spans) for piece in pieces)
    rows_per_shard = rows_per_shard or min(ROWS_PER_SHARD, max(16, -(-rows // SHARDS_WANTED)))
    chunks = tuple(cut(pieces, rows_per_shard))
    images = Path(os.path.abspath(images))
    boxes = FRAME_NAMES[boxes]
    settings = {"format": FORMAT, "images": str(images), "split": split, "boxes": boxes, "rows_per_shard": rows_per_shard}
    settings["sources"] = digest
    return _Plan(Job(images, out / "parts", split, boxes), out, chunks, settings)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Creates the folder; one preparation at a time writes to it. Raises: GlimpseError, also for a folder with other things in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        state = out / STATE
        foreign = [path.name for path in out.iterdir() if not state.exists() and not OURS.fullmatch(path.name)]
        if foreign:
            raise GlimpseError(f"--out {out}: holds other things ({sorted(foreign)[0]}); choose a new folder")
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise GlimpseError(f"--out {out}: cannot be written ({error.strerror})") from error
    with lock:  # closing it lets it go, and so does dying
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise GlimpseError(f"--out {out}: another gp-jax prepare is writing there") from error
        yield


def _resume(plan: _Plan, overwrite: bool) -> bool:
    """Makes the folder ready for this plan. Returns: whether its work is finished already."""
    path = plan.out / STATE
    try:
        known = json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        known = {}
    known = known if isinstance(known, dict | None) else {}
    if known is not None and overwrite:
        _write(path, "{}\n")  # from here on the old preparation is not whole
        for old in plan.out.iterdir():
            if old.name == "parts" or old.name.endswith(".partial"):
                shutil.rmtree(old, ignore_errors=True)
            if OURS.fullmatch(old.name) and old.is_file() and old.name != ".lock":
                old.unlink()
        path.unlink()
        known = None
    if known is None:
        plan.job.parts.mkdir(exist_ok=True)
        _write(path, json.dumps({**plan.state, "finished": False}, indent=1) + "\n")
        return False
    different = [name for name, value in plan.state.items() if known.get(name, "") != value]
    if different:
        raise GlimpseError(
            f"--out {plan.out}: holds another preparation (other {', '.join(different)}); choose another --out or pass --overwrite"
        )
    finished = bool(known.get("finished"))
    if not finished:
        plan.job.parts.mkdir(exist_ok=True)
    return finished


def _sidecars(plan: _Plan) -> list[dict]:
    paths = [sidecar_path(plan.job.parts, chunk.index) for chunk in plan.chunks]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def _finished_report(out: Path) -> Report:
    path = out / "report.json"
    try:
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GlimpseError(f"{path}: the report of the finished preparation is missing or damaged; --overwrite prepares again") from error


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GlimpseError(f"--out {out}: cannot be written ({error}); run again to go on") from error


def _finalise(plan: _Plan) -> None:
    """Gives shards their final names, joins the indexes, and writes TFDS's metadata. May be interrupted and repeated."""
    shards: dict[str, list[tuple[int, int, int]]] = {}  # split -> (chunk, examples, bytes)
    for chunk, sidecar in zip(plan.chunks, _sidecars(plan), strict=True):
        for split, (examples, size) in sidecar["shards"].items():
            shards.setdefault(split, []).append((chunk.index, examples, size))
    for split, known in sorted(shards.items()):
        scratch = plan.out / f"index-{split}.jsonl.partial"
        with scratch.open("wb") as index:
            for number, (chunk, _, _) in enumerate(known):
                part = part_path(plan.job.parts, chunk, split)
                final = plan.out / builder.shard_name(split, number, len(known))
                if part.exists() or not final.exists():
                    part.replace(final)
                index.write(part.with_suffix(".index").read_bytes())
        scratch.replace(plan.out / f"index-{split}.jsonl")
    description = "Questions about pictures, with the regions that hold the evidence. Written by gp-jax prepare."
    lengths = {split: [shard[1:] for shard in known] for split, known in sorted(shards.items())}
    builder.write_metadata(plan.out, lengths, description, "https://arxiv.org/abs/2508.01548")
    _write(plan.out / STATE, json.dumps({**plan.state, "finished": True}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
