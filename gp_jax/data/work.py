"""The work of one process: a chunk of rows becomes a shard per split, its index lines and, last, a sidecar that says it is done."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from gp_jax.data.builder import ShardWriter, encode
from gp_jax.data.checks import Checker
from gp_jax.data.formats import BadRow, parse_row
from gp_jax.data.record import Record
from gp_jax.data.report import Report
from gp_jax.data.sources import Chunk
from gp_jax.errors import GlimpseError


@dataclass(frozen=True)
class Job:
    """What is the same for all chunks."""

    images: Path
    parts: Path
    split: str | None
    boxes: str


def part_path(parts: Path, chunk: int, split: str) -> Path:
    """A chunk's records of one split. Its index lies beside it, with suffix .index."""
    return parts / f"{chunk:05d}-{split}.shard"


def sidecar_path(parts: Path, chunk: int) -> Path:
    """A chunk's report; there when the chunk is done."""
    return parts / f"{chunk:05d}.json"


def finish_all(job: Job, chunks: Sequence[Chunk], workers: int, allowed: float, progress: bool) -> None:
    """Does what is not done yet; stops early when more rows than allowed are bad.

    Raises: GlimpseError when the disk or a process fails; all that was done remains.
    """
    from tqdm import tqdm

    done = {chunk.index for chunk in chunks if sidecar_path(job.parts, chunk.index).exists()}
    bad = sum(_bad_rows(job, index) for index in done)
    todo = [chunk for chunk in chunks if chunk.index not in done]
    rows = sum(chunk.rows for chunk in chunks)
    with tqdm(total=rows, initial=rows - sum(c.rows for c in todo), unit="row", desc="preparing", disable=not progress) as bar:
        bar.set_postfix(bad=bad)
        if bad > allowed or not todo:
            return
        pool = contextlib.nullcontext() if min(workers, len(todo)) == 1 else _pool(job, min(workers, len(todo)))
        with pool as executor:
            finished = _finished(executor, job, todo)
            try:
                for chunk_rows, chunk_bad in finished:
                    bad += chunk_bad
                    bar.update(chunk_rows)
                    bar.set_postfix(bad=bad)
                    if bad > allowed:
                        break
            except BrokenProcessPool as error:
                raise GlimpseError(
                    "a worker process died, perhaps of too little memory; run again to go on (try fewer --workers)"
                ) from error
            except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
                raise GlimpseError(f"{job.parts}: cannot be written ({' '.join(str(error).split())[:200]}); run again to go on") from error
            finally:
                if executor:
                    executor.shutdown(wait=True, cancel_futures=True)


def _pool(job: Job, workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the parent may run threads (of JAX, of a notebook) that a fork would leave half alive.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,))


def _finished(executor: ProcessPoolExecutor | None, job: Job, chunks: Sequence[Chunk]):
    if executor is None:
        checker = Checker(job.images)
        for chunk in chunks:
            yield finish(chunk, job, checker)
    else:
        for future in as_completed([executor.submit(_finish_in_worker, chunk) for chunk in chunks]):
            yield future.result()


def _bad_rows(job: Job, chunk: int) -> int:
    return json.loads(sidecar_path(job.parts, chunk).read_text(encoding="utf-8"))["report"]["bad"]


_worker: tuple[Job, Checker] | None = None  # of a worker process


def _start_worker(job: Job) -> None:
    global _worker
    _worker = (job, Checker(job.images))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent lets us end our chunk

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # a killed parent must not leave writers behind

    threading.Thread(target=follow_parent, daemon=True).start()


def _finish_in_worker(chunk: Chunk) -> tuple[int, int]:
    return finish(chunk, *_worker)


def finish(chunk: Chunk, job: Job, checker: Checker) -> tuple[int, int]:
    """Reads, checks and writes one chunk. Returns: rows, and how many are bad."""
    report = Report(rows=chunk.rows)
    index: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for where, stem, data in chunk.read():
            try:
                row = parse_row(data, where, stem, job.boxes, job.split)
                record, sizes = checker.check(row)
            except BadRow as error:
                report.add_bad(error.reason, where, error.detail)
                continue
            if row.split not in writers:
                writers[row.split] = stack.enter_context(ShardWriter(part_path(job.parts, chunk.index, row.split)))
            writers[row.split].write(encode(record, sizes))
            index.setdefault(row.split, []).append(index_line(record, sizes))
            report.add_good(row.split, record.dataset)
    for split, lines in index.items():
        part_path(job.parts, chunk.index, split).with_suffix(".index").write_text("".join(lines), encoding="utf-8")
    shards = {split: (writer.examples, writer.bytes) for split, writer in sorted(writers.items())}
    sidecar = sidecar_path(job.parts, chunk.index)
    scratch = sidecar.with_suffix(".partial")
    scratch.write_text(json.dumps({"shards": shards, "report": report.as_dict()}, ensure_ascii=False), encoding="utf-8")
    scratch.replace(sidecar)
    return report.total, report.bad


def index_line(record: Record, sizes: Sequence[tuple[int, int]]) -> str:
    """What `record.Entry` holds, as JSON."""
    fields = {"id": record.id, "dataset": record.dataset, "question": record.question, "answer": record.answer, "sizes": sizes}
    return json.dumps(fields, ensure_ascii=False) + "\n"
