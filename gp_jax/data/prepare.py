"""Writes public annotation files as a TFDS folder: checked, in shards, resumable, with several processes.

During the work the output folder holds `prepare.json` (what is being prepared) and `parts/`. In `parts/` there is a shard and its index
per chunk of source rows and split, and per chunk a sidecar with its report. The sidecar is written last: a chunk that has one is done. At
the end the shards are renamed, so nothing is copied. Chunks depend on the sources alone, so the result is the same for any number of
processes and any number of interruptions.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gp_jax.data import builder
from gp_jax.data.formats import FRAME_NAMES, SPLIT_NAME
from gp_jax.data.prepared import open_prepared
from gp_jax.data.sources import Chunk, cut, find_files, scan
from gp_jax.data.tally import KEPT, Report, read_as
from gp_jax.data.work import Done, Job, final_paths, finish_all, part_path
from gp_jax.errors import GlimpseError, one_line
from gp_jax.runtime.disk import kind_of, path_of, read_bytes, read_json, write_text, writing
from gp_jax.runtime.lock import FILE as LOCK
from gp_jax.runtime.lock import only_one

ROWS_PER_SHARD = 512  # at most; photographs then take about 100 MB
SHARDS_WANTED = 64  # of a small data set, so that several processes can share the work
ROWS_WORTH_A_WORKER = 500  # starting a process takes as long as preparing hundreds of rows
MAX_REPORT = 1 << 30  # bytes; the report lists every data set
FORMAT = 1  # to be raised when the same rows would give other bytes
STATE = "prepare.json"
METADATA = r"(report|features|dataset_info|shards)\.(json|txt)"
OURS = re.compile(rf"{builder.NAME}-.*\.{builder.SUFFIX}-.*|index-.*\.jsonl|{METADATA}|.*\.partial")


@dataclass(frozen=True)
class _Plan:
    """One preparation: its rows, its settings and where it is written."""

    job: Job
    out: Path
    chunks: tuple[Chunk, ...]
    state: dict  # must be equal for interrupted work to be resumed

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
    """Checks annotation rows and writes the good ones as a TFDS folder.

    Args:
      sources: annotation files, or folders with them (formats.py lists the formats). images: the folder of pictures.
      out: a new folder, or that of the same preparation: interrupted work is continued, finished work only returns its report.
      split: for all rows, instead of each row's own `split` (or "train").
      boxes: what box numbers of 'your own' rows mean: "auto" (each row's box_format), "pixel", "normalized" or "0-1000".
      workers: processes; default: one per core, fewer for small sets. max_bad_share: when a larger share of all rows is bad, work stops.
      rows_per_shard: source rows; default: 512, fewer for small sets. offenders: bad rows shown per reason, at most 20.
      overwrite: delete another preparation that is in the folder and start again.
    Returns: the report, with counts and the first bad rows; it is also written to report.json and report.txt.
    Raises: GlimpseError before any work for missing or unreadable sources and wrong settings; TooManyBad.
    """
    _check_settings(split, boxes, workers, max_bad_share, rows_per_shard, offenders)
    plan = _make_plan(sources, images, out, split, boxes, rows_per_shard)
    _check_folder(plan.out)
    with only_one(plan.out, "gp-jax prepare"), writing(plan.out):
        done, allowed = None, max_bad_share * plan.rows
        if _resume(plan, overwrite):
            report = _finished_report(plan.out)
            for split in report.splits:
                open_prepared(plan.out, split)
        else:
            done = finish_all(plan.job, plan.chunks, workers or min(_cores(), 1 + plan.rows // ROWS_WORTH_A_WORKER), allowed, progress)
            report = Report.merged((one.report for one in done), plan.rows)
        write_text(plan.out / "report.txt", report.text(offenders) + "\n")
        write_text(plan.out / "report.json", json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
        if report.bad > allowed or not report.good:
            raise TooManyBad(report, max_bad_share, plan.out)
        if done is not None:
            _finalise(plan, done)
        shutil.rmtree(plan.job.parts, ignore_errors=True)
    return report


class TooManyBad(GlimpseError):
    """The share of bad rows is above the limit. `report` has the counts and the first bad rows."""

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
    images, out = path_of(images), path_of(out)
    files = find_files(sources)
    if kind_of(images) != "folder":
        raise GlimpseError(f"--images {images}: {'is not a folder' if kind_of(images) else 'no such folder'}")
    if kind_of(out) not in (None, "folder"):
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


def _check_folder(out: Path) -> None:
    """Raises: GlimpseError for a folder with files of anything else."""
    if kind_of(out) is None or kind_of(out / STATE) is not None:
        return
    with writing(out):
        foreign = sorted(path.name for path in out.iterdir() if path.name != LOCK and path.suffix != ".partial")
    if foreign:
        raise GlimpseError(f"--out {out}: holds other things ({foreign[0]}); choose a new folder")


def _resume(plan: _Plan, overwrite: bool) -> bool:
    """Prepares the folder for this plan. Returns: whether the plan's work is finished already."""
    path = plan.out / STATE
    known = {} if overwrite or kind_of(path) is None else _known(path)
    if overwrite or (not known and kind_of(plan.out / "dataset_info.json") is None):
        write_text(path, "{}\n")  # marks earlier content as incomplete: it is deleted from here on
        for old in plan.out.iterdir():
            if old.name == "parts" or old.name.endswith(".partial"):
                shutil.rmtree(old, ignore_errors=True)
            if OURS.fullmatch(old.name) and kind_of(old) != "folder":
                old.unlink()
        plan.job.parts.mkdir(exist_ok=True)
        write_text(path, json.dumps({**plan.state, "finished": False}, indent=1) + "\n")
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


def _known(path: Path) -> dict:
    try:
        return read_json(path)
    except GlimpseError as error:
        raise GlimpseError(f"{error}; nothing else says what was prepared there: choose another --out or pass --overwrite") from error


def _finished_report(out: Path) -> Report:
    path = out / "report.json"
    try:
        return read_as(Report, read_bytes(path, MAX_REPORT))
    except (GlimpseError, ValueError) as error:
        reason = one_line(error)
        raise GlimpseError(f"{path}: is damaged ({reason}); what was prepared is there, --overwrite prepares it again") from error


def _finalise(plan: _Plan, done: Sequence[Done]) -> None:
    """Renames the shards, joins their indexes and writes TFDS's metadata. It can be interrupted and repeated."""
    finals = final_paths(plan.job, dict(enumerate(done)))
    lengths: dict[str, list[tuple[int, int]]] = {}
    for (chunk, split), final in finals.items():
        part, known = part_path(plan.job.parts, chunk, split), done[chunk].parts[split]
        if part.exists():  # otherwise it was renamed before an interruption
            part.replace(final)
        scratch = plan.out / f"index-{split}.jsonl.partial"
        with scratch.open("ab" if split in lengths else "wb") as index:
            index.write(part.with_suffix(".index").read_bytes())
        lengths.setdefault(split, []).append((known.examples, known.bytes))
    for split in lengths:
        (plan.out / f"index-{split}.jsonl.partial").replace(plan.out / f"index-{split}.jsonl")
    description = "Questions about pictures, with the regions that hold the evidence. Written by gp-jax prepare."
    builder.write_metadata(plan.out, lengths, description, "https://arxiv.org/abs/2508.01548")
    write_text(plan.out / STATE, json.dumps({**plan.state, "finished": True}, indent=1) + "\n")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
