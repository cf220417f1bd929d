"""Writes a split of the benchmark as a prepared folder, which training and evaluation read like any other."""

import shutil
from pathlib import Path
from typing import Literal

from gp_jax.data import builder
from gp_jax.data.work import index_line
from gp_jax.errors import GlimpseError, one_line
from gp_jax.runtime.disk import kind_of, path_of, writing
from gp_jax.runtime.lock import FILE as LOCK
from gp_jax.runtime.lock import only_one
from gp_jax.runtime.progress import Progress
from gp_jax.scenes.source import ScenesSource, scene_question

RECORDS_PER_SHARD = 512
DESCRIPTION = "Generated scenes with questions and the boxes of their evidence. Written by python -m gp_jax.scenes."
HOMEPAGE = "https://arxiv.org/abs/2508.01548"

Split = Literal["train", "val", "test", "test_ood"]


def write(out: Path, split: Split, count: int, start: int = 0, progress: bool = True, seed: int = 0) -> None:
    """Writes records start .. start + count - 1. The folder gets its name when it is complete.

    Args: out: a new folder; progress: whether to show it.
    Raises: GlimpseError for an existing folder, bad numbers or a disk that cannot be written.
    """
    source, out = ScenesSource(split, count, start, seed=seed), path_of(out)
    _check_new(out)
    shards = -(-count // RECORDS_PER_SHARD)
    scratch = out.parent / f".{out.name}.partial"
    with only_one(scratch, "gp_jax.scenes"), writing(out):
        _check_new(out)  # another process may just have written it
        _clear(scratch)  # left by a process that was killed
        try:
            lengths = []
            bar = Progress(total=count, unit="scene", desc=f"drawing {split}", disable=not progress)
            with bar, (scratch / f"index-{split}.jsonl").open("w", encoding="utf-8") as index:
                for shard in range(shards):
                    with builder.ShardWriter(scratch / builder.shard_name(split, shard, shards)) as writer:
                        for i in range(shard * count // shards, (shard + 1) * count // shards):
                            record = source[i]
                            sizes = (scene_question(split, start + i, seed)[0].canvas,)
                            writer.write(builder.encode(record, sizes))
                            index.write(index_line(record, sizes))
                            bar.update()
                    lengths.append((writer.examples, writer.bytes))
            builder.write_metadata(scratch, {split: lengths}, DESCRIPTION, HOMEPAGE)
            scratch.rename(out)
        except RuntimeError as error:  # array_record raises it when the disk fails
            raise GlimpseError(f"{out}: cannot be written ({one_line(error)})") from error
        finally:
            _clear(scratch)


def _check_new(out: Path) -> None:
    if kind_of(out) is not None:
        raise GlimpseError(f"{out}: exists already; choose a new folder")


def _clear(folder: Path) -> None:
    """Deletes everything in a folder except the lock."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
