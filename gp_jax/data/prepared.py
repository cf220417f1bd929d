"""Reads prepared folders: any record by its number, and entries without opening pictures. Folders may be gs:// paths."""

import bisect
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gp_jax.data.builder import SIZES, SUFFIX, decode
from gp_jax.data.record import BadRecord, Entry, Record
from gp_jax.data.tally import Natural, read_as, say
from gp_jax.errors import GlimpseError, one_line
from gp_jax.runtime.disk import MAX_JSON, check_regular, folder_of, kind_of, read_bytes, read_json
from gp_jax.runtime.progress import Progress

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordReader
    from etils import epath

MAX_INDEX = 8 << 30  # bytes
OPEN_SHARDS = 32  # per process; a large data set has more shards than a process may have open files


class PreparedSource:
    """A split of a prepared folder, as a `record.Source`. It is pickled as (folder, split), and opens files when they are first read."""

    def __init__(self, folder: str, split: str = "train", progress: bool = True) -> None:
        self.folder, self.split, self._progress = folder, split, progress

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "split": self.split, "_progress": self._progress}

    def __repr__(self) -> str:
        return f"PreparedSource({self.folder!r}, {self.split!r})"

    @property
    def name(self) -> str:
        """Folder and split."""
        return f"{self.folder} ({self.split})"

    @functools.cached_property
    def _info(self) -> tuple[list[str], list[int], int]:
        return _read_info(self.folder, self.split)

    @functools.cached_property
    def _shards(self) -> tuple[list[str], list[int]]:
        """Paths of the shards, and the number of the first record of each, followed by the total."""
        paths, lengths, _ = self._info
        return paths, [0, *itertools.accumulate(lengths)]

    @functools.cached_property
    def made_from(self) -> str:
        """Digest of everything that entries do not contain: annotation files, meaning of their boxes, bytes of all pictures and masks."""
        state = read_json(folder_of(self.folder) / "prepare.json", required=False)
        facts = [state.get(name) for name in ("format", "sources", "boxes")] + [self._info[2]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @functools.cached_property
    def _reader(self) -> "functools._lru_cache_wrapper":
        return functools.lru_cache(OPEN_SHARDS)(_open_shard)

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """One entry per record, in order: from the index, or by reading every record where there is no index."""
        path = folder_of(self.folder) / f"index-{self.split}.jsonl"
        if kind_of(path) is None:
            return self._scan("no index")
        try:
            entries = [read_as(Entry, line) for line in read_bytes(path, MAX_INDEX).split(b"\n") if line]
            if len(entries) != len(self):
                raise ValueError(f"{len(entries)} lines for {len(self)} records")
        except (GlimpseError, ValueError) as error:
            say(f"{path}: is damaged ({one_line(error)}); records are read instead")
            return self._scan("no whole index")
        return entries

    def _scan(self, why: str) -> list[Entry]:
        entries = []
        for i in Progress(range(len(self)), desc=f"{why} in {self.folder}, reading", unit="record", disable=not self._progress):
            record, sizes = self._read(i)
            entries.append(Entry(record.id, record.dataset, record.question, record.answer, sizes))
        return entries

    def __len__(self) -> int:
        return self._shards[1][-1]

    def __getitem__(self, index: int) -> Record:
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[Record, tuple[tuple[int, int], ...]]:
        index = index.__index__()
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: record {index} of {len(self)}")
        index %= len(self)
        paths, starts = self._shards
        shard = bisect.bisect_right(starts, index) - 1
        try:
            return decode(self._reader(paths[shard], starts[shard + 1] - starts[shard]).read([index - starts[shard]])[0])
        except GlimpseError:
            raise
        except Exception as error:  # array_record, protobuf and TFDS raise different errors for damaged files
            raise BadRecord(f"{paths[shard]}: record {index - starts[shard]} is damaged ({one_line(error)})") from error


def open_prepared(folder: "str | epath.PathLike", split: str = "train", progress: bool = True) -> PreparedSource:
    """A split of a folder that `gp-jax prepare` (or TFDS, with the same features) wrote.

    Raises: GlimpseError for a folder without finished data, an unknown split, or a shard that is missing or was cut off.
    """
    source = PreparedSource(str(folder), split, progress)
    len(source)
    return source


def _read_info(name: str, split: str) -> tuple[list[str], list[int], int]:
    """Paths of a split's shards, their numbers of records, and their bytes in total. Raises: GlimpseError."""
    from tensorflow_datasets.core import dataset_info, naming
    from tensorflow_datasets.core import splits as splits_lib

    folder = folder_of(name)
    path = folder / "dataset_info.json"
    if kind_of(folder) != "folder":
        raise GlimpseError(f"{name}: no such folder")
    if kind_of(path) is None:
        unfinished = kind_of(folder / "prepare.json") is not None
        hint = "gp-jax prepare has not finished there, run it again" if unfinished else "make one with gp-jax prepare"
        raise GlimpseError(f"{name}: is not a prepared folder, it has no dataset_info.json ({hint})")
    read_json(path)  # checks its size and depth before TFDS reads it
    try:
        proto = dataset_info.read_proto_from_builder_dir(folder)
        template = naming.ShardedFileTemplate(data_dir=folder, dataset_name=proto.name, filetype_suffix=proto.file_format or SUFFIX)
        splits = splits_lib.SplitDict.from_proto(proto.splits, template)
        known = {own: (list(map(str, info.filepaths)), list(info.shard_lengths), info.num_bytes) for own, info in splits.items()}
    except Exception as error:  # damaged metadata make TFDS raise many kinds of errors
        raise GlimpseError(f"{path}: cannot be read ({one_line(error)})") from error
    if split not in known:
        raise GlimpseError(f"{name}: has no split '{split}' (there are: {', '.join(sorted(known))})")
    paths, lengths, _ = known[split]
    if min(lengths, default=0) < 0 or sum(lengths) > 2**40:
        raise GlimpseError(f"{path}: has {min(lengths)} to {max(lengths)} records in a shard")
    if isinstance(folder, Path):
        _check_shards(folder, list(map(Path, paths)))
    return known[split]


def _check_shards(folder: Path, paths: list[Path]) -> None:
    """Raises: GlimpseError unless every shard has the size that was written. A folder that TFDS itself wrote has no list of sizes."""
    try:
        sizes = read_as(dict[str, Natural], read_bytes(folder / SIZES, MAX_JSON))
    except (GlimpseError, ValueError) as error:
        say(f"{folder / SIZES}: is missing or damaged ({one_line(error)}); whether shards are complete is only seen when they are read")
        sizes = {}
    for path in paths:
        if not os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep):
            raise GlimpseError(f"{folder / 'dataset_info.json'}: names a shard outside the folder ({path})")
        check_regular(path)
        written, size = sizes.get(path.name), path.stat().st_size
        if written not in (None, size):
            raise GlimpseError(f"{path}: is cut off or another file ({size} bytes, {written} were written); prepare it again")


def _open_shard(path: str, length: int) -> "ArrayRecordReader":
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, "readahead_buffer_size:0")
    if not reader.ok() or reader.num_records() != length:
        raise GlimpseError(f"{path}: is missing, damaged or cut off")
    return reader
