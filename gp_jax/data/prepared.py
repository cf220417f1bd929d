"""Reading prepared folders: records at random by number, entries without opening a picture. Folders may be gs:// paths."""

import bisect
import functools
import hashlib
import itertools
import json
from typing import TYPE_CHECKING

from gp_jax.data.builder import decode
from gp_jax.data.record import Entry, Record
from gp_jax.errors import GlimpseError

if TYPE_CHECKING:
    from etils import epath

OPEN_SHARDS = 32  # per process; a large set has more shards than a process may open files


class PreparedSource:
    """A split of a prepared folder, a `record.Source`. Pickles as (folder, split) and opens files when first asked."""

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
        """Paths, and the number of the first record of each, ending with the total."""
        paths, lengths, _ = self._info
        return paths, [0, *itertools.accumulate(lengths)]

    @functools.cached_property
    def made_from(self) -> str:
        """Digest of what entries do not show, the evidence: annotation files, meaning of their boxes, bytes of all pictures and masks."""
        from etils import epath

        path = epath.Path(self.folder) / "prepare.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            facts = [state.get(name) for name in ("format", "sources", "boxes")]
        except (ValueError, AttributeError) as error:
            raise GlimpseError(f"{path}: is damaged ({error})") from error
        facts.append(self._info[2])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @functools.cached_property
    def _reader(self) -> "functools._lru_cache_wrapper":
        return functools.lru_cache(OPEN_SHARDS)(_open_shard)

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """One per record, in order: from the index, or by reading every record where there is none."""
        from etils import epath

        path = epath.Path(self.folder) / f"index-{self.split}.jsonl"
        if not path.exists():
            return self._scan()
        try:
            entries = [_entry(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (ValueError, KeyError, TypeError) as error:
            raise GlimpseError(f"{path}: is damaged ({error}); without this file records are read instead") from error
        if len(entries) != len(self):
            raise GlimpseError(f"{path}: has {len(entries)} lines, the shards have {len(self)} records")
        return entries

    def _scan(self) -> list[Entry]:
        from tqdm import tqdm

        entries = []
        for i in tqdm(range(len(self)), desc=f"no index in {self.folder}, reading", unit="record", disable=not self._progress):
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
        except Exception as error:  # array_record, protobuf and TFDS each have their own for damaged files
            reason = " ".join(str(error).split())[:200]
            raise GlimpseError(f"{paths[shard]}: record {index - starts[shard]} is damaged ({reason})") from error


def open_prepared(folder: "str | epath.PathLike", split: str = "train", progress: bool = True) -> PreparedSource:
    """A split of a folder that `gp-jax prepare` (or TFDS, with the same features) wrote.

    Raises: GlimpseError for a folder without finished data, or an unknown split.
    """
    source = PreparedSource(str(folder), split, progress)
    len(source)
    return source


def _read_info(folder: str, split: str) -> tuple[list[str], list[int], int]:
    """Paths and lengths of a split's shards, and their bytes. Raises: GlimpseError."""
    import tensorflow_datasets as tfds
    from etils import epath

    path = epath.Path(folder)
    if not path.exists():
        raise GlimpseError(f"{folder}: no such folder")
    if not (path / "dataset_info.json").exists():
        unfinished = (path / "prepare.json").exists()
        hint = "gp-jax prepare has not finished there, run it again" if unfinished else "make one with gp-jax prepare"
        raise GlimpseError(f"{folder}: is not a prepared folder, it has no dataset_info.json ({hint})")
    try:
        splits = tfds.builder_from_directory(path).info.splits
        known = {name: (list(map(str, info.filepaths)), list(info.shard_lengths), info.num_bytes) for name, info in splits.items()}
    except Exception as error:  # whatever TFDS makes of damaged metadata
        raise GlimpseError(f"{folder}: its metadata cannot be read ({' '.join(str(error).split())[:200]})") from error
    if split not in known:
        raise GlimpseError(f"{folder}: has no split '{split}' (there are: {', '.join(sorted(known))})")
    return known[split]


def _open_shard(path: str, length: int) -> "ArrayRecordReader":  # noqa: F821
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, "readahead_buffer_size:0")
    if not reader.ok() or reader.num_records() != length:
        raise GlimpseError(f"{path}: is missing, damaged or cut off")
    return reader


def _entry(line: str) -> Entry:
    fields = json.loads(line)
    sizes = tuple((int(width), int(height)) for width, height in fields["sizes"])
    return Entry(fields["id"], fields["dataset"], fields["question"], fields["answer"], sizes)
