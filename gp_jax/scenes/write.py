"""A split of the benchmark as a prepared folder, which `open_prepared`, training and evaluation read like any other."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

from gp_jax.data import builder
from gp_jax.data.work import index_line
from gp_jax.errors import GlimpseError
from gp_jax.scenes.source import ScenesSource, scene_question

RECORDS_PER_SHARD = 512
DESCRIPTION = "Generated scenes with questions and the boxes of their evidence. Written by python -m gp_jax.scenes."
HOMEPAGE = "https://arxiv.org/abs/2508.01548"

Split = Literal["train", "val", "test", "test_ood"]


def write(out: Path, split: Split, count: int, start: int = 0, progress: bool | None = None, seed: int = 0) -> None:
    """Writes records start .. start + count - 1. The folder appears under its name only when it is whole.

    Args: out: a new folder; progress: whether to show a bar; default: on a terminal.
    Raises: GlimpseError for an existing folder, bad numbers or a disk that cannot be written.
    """
    from tqdm import tqdm

    source = ScenesSource(split, count, start, seed=seed)
    if out.exists():
        raise GlimpseError(f"{out}: exists already; choose a new folder")
    shards = -(-count // RECORDS_PER_SHARD)
    silent = not (sys.stderr.isatty() if progress is None else progress)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise GlimpseError(f"{out}: cannot be written ({error.strerror})") from error
    try:
        lengths = []
        bar = tqdm(total=count, unit="scene", desc=f"drawing {split}", disable=silent)
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
        scratch.chmod(0o755)  # mkdtemp's folders are for their owner alone
        scratch.rename(out)
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        raise GlimpseError(f"{out}: cannot be written ({' '.join(str(error).split())[:200]})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
