"""The work of one process: writes a chunk of rows as one shard and index per split, and last a sidecar that marks the chunk as done."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from gp_jax.data.builder import ShardWriter, encode, shard_name
from gp_jax.data.checks import Checker
from gp_jax.data.formats import BadRow, parse_row
from gp_jax.data.record import Record
from gp_jax.data.sources import Chunk
from gp_jax.data.tally import Natural, Report, read_as, say
from gp_jax.errors import GlimpseError, one_line
from gp_jax.runtime.disk import MAX_JSON, kind_of, read_bytes, write_text
from gp_jax.runtime.progress import Progress


@dataclass(frozen=True)
class Job:
    """The settings that all chunks share."""

    images: Path
    parts: Path
    split: str | None
    boxes: str


@dataclass(frozen=True)
class Shard:
    """Sizes of the records of one chunk and split."""

    examples: Natural
    bytes: Natural  # of the records
    size: Natural  # of the shard's file
    index: Natural  # of the index file


@dataclass(frozen=True)
class Done:
    """The content of a chunk's sidecar."""

    parts: dict[str, Shard]  # by split
    report: Report


def part_path(parts: Path, chunk: int, split: str) -> Path:
    """The shard of a chunk and split. Its index has the same name with the suffix .index."""
    return parts / f"{chunk:05d}-{split}.shard"


def sidecar_path(parts: Path, chunk: int) -> Path:
    """The sidecar of a chunk; it exists when the chunk is done."""
    return parts / f"{chunk:05d}.json"


def finish_all(job: Job, chunks: Sequence[Chunk], workers: int, allowed: float, progress: bool) -> list[Done]:
    """Writes all chunks that are not done yet; stops early when more than `allowed` rows are bad. Returns: the sidecars of finished chunks.

    Raises: GlimpseError when the disk or a process fails; finished chunks remain on disk.
    """
    done = find_done(job, chunks)
    bad = sum(one.report.bad for one in done.values())
    todo = [chunk for chunk in chunks if chunk.index not in done]
    rows = sum(chunk.rows for chunk in chunks)
    with Progress(total=rows, initial=rows - sum(c.rows for c in todo), unit="row", desc="preparing", disable=not progress) as bar:
        bar.set_postfix(bad=bad)
        if bad > allowed or not todo:
            return list(done.values())
        pool = contextlib.nullcontext() if min(workers, len(todo)) == 1 else _pool(job, min(workers, len(todo)))
        with pool as executor:
            try:
                for index, one in _finished(executor, job, todo):
                    done[index] = one
                    bad += one.report.bad
                    bar.update(one.report.total)
                    bar.set_postfix(bad=bad)
                    if bad > allowed:
                        break
            except BrokenProcessPool as error:
                raise GlimpseError(
                    "a worker process died, perhaps because memory ran out; run again to go on (try fewer --workers)"
                ) from error
            except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
                named, reason = getattr(error, "filename", None) or job.parts, getattr(error, "strerror", None) or error
                raise GlimpseError(f"{named}: cannot be written ({one_line(reason)}); run again to go on") from error
            finally:
                if executor:
                    executor.shutdown(wait=True, cancel_futures=True)
    return [done[index] for index in sorted(done)]


def find_done(job: Job, chunks: Sequence[Chunk]) -> dict[int, Done]:
    """Finished chunks by number. A chunk with a damaged file is reported and will be written again."""
    done = {}
    for chunk in chunks:
        path = sidecar_path(job.parts, chunk.index)
        if kind_of(path) is None:
            continue
        try:
            done[chunk.index] = read_as(Done, read_bytes(path, MAX_JSON))
        except (GlimpseError, ValueError) as error:
            say(f"{path}: is damaged ({one_line(error)}); its rows are read again")
    finals = final_paths(job, done) if len(done) == len(chunks) else {}
    for index, one in list(done.items()):
        for split, part in one.parts.items():
            path = part_path(job.parts, index, split)
            placed = path if kind_of(path) is not None else finals.get((index, split), path)  # `_finalise` had renamed it
            sizes = {placed: part.size, path.with_suffix(".index"): part.index}
            wrong = next((path for path, size in sizes.items() if kind_of(path) != "file" or path.stat().st_size != size), None)
            if wrong is not None and done.pop(index, None):
                say(f"{wrong}: is missing or cut off; its rows are read again")
    return done


def final_paths(job: Job, done: dict[int, Done]) -> dict[tuple[int, str], Path]:
    """The final path of every (chunk, split)."""
    chunks: dict[str, list[int]] = {}
    for index, one in sorted(done.items()):
        for split in one.parts:
            chunks.setdefault(split, []).append(index)
    return {
        (index, split): job.parts.parent / shard_name(split, number, len(own))
        for split, own in sorted(chunks.items())
        for number, index in enumerate(own)
    }


def _pool(job: Job, workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the parent may have threads (JAX, a notebook), whose locks a forked child would inherit in any state.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,))


def _finished(executor: ProcessPoolExecutor | None, job: Job, chunks: Sequence[Chunk]) -> Iterator[tuple[int, Done]]:
    if executor is None:
        checker = Checker(job.images)
        for chunk in chunks:
            yield chunk.index, finish(chunk, job, checker)
    else:
        futures = {executor.submit(_finish_in_worker, chunk): chunk.index for chunk in chunks}
        for future in as_completed(futures):
            yield futures[future], future.result()


_worker: tuple[Job, Checker] | None = None  # set in worker processes


def _start_worker(job: Job) -> None:
    global _worker
    _worker = (job, Checker(job.images))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent waits for this chunk

    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"

    def follow_parent() -> None:
        parent.join()
        os._exit(1)  # when the parent is killed its workers must not go on writing

    threading.Thread(target=follow_parent, daemon=True).start()


def _finish_in_worker(chunk: Chunk) -> Done:
    assert _worker is not None, "set by _start_worker"
    return finish(chunk, *_worker)


def finish(chunk: Chunk, job: Job, checker: Checker) -> Done:
    """Reads, checks and writes one chunk."""
    report = Report(rows=chunk.rows)
    index: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for where, stem, data in chunk.read():
            try:
                split, record, sizes, stored = _make(data, where, stem, job, checker)
            except BadRow as error:
                report.add_bad(error.reason, where, error.detail)
                continue
            if split not in writers:
                writers[split] = stack.enter_context(ShardWriter(part_path(job.parts, chunk.index, split)))
            writers[split].write(stored)
            index.setdefault(split, []).append(index_line(record, sizes))
            report.add_good(split, record.dataset)
    parts = {}
    for split, writer in sorted(writers.items()):
        lines = "".join(index[split]).encode()
        writer.path.with_suffix(".index").write_bytes(lines)
        parts[split] = Shard(writer.examples, writer.bytes, writer.path.stat().st_size, len(lines))
    fields = {"parts": {split: dataclasses.asdict(part) for split, part in parts.items()}, "report": report.as_dict()}
    write_text(sidecar_path(job.parts, chunk.index), json.dumps(fields, ensure_ascii=False))
    return Done(parts, report)


def _make(data: bytes, where: str, stem: str, job: Job, checker: Checker) -> tuple[str, Record, tuple, bytes]:
    """One row's split, record, sizes of pictures, and stored bytes. Raises: BadRow for anything that is wrong with the row; OSError."""
    try:
        row = parse_row(data, where, stem, job.boxes, job.split)
        record, sizes = checker.check(row)
        return row.split, record, sizes, encode(record, sizes)
    except (BadRow, OSError):
        raise
    except Exception as error:  # an unexpected error in this code or a library must not stop the whole preparation
        raise BadRow("unexpected", f"{type(error).__name__}: {error}") from error


def index_line(record: Record, sizes: Sequence[tuple[int, int]]) -> str:
    """The fields of a `record.Entry` as one line of JSON."""
    fields = {"id": record.id, "dataset": record.dataset, "question": record.question, "answer": record.answer, "sizes": sizes}
    return json.dumps(fields, ensure_ascii=False) + "\n"
