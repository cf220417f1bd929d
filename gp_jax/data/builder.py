"""Prepared data as a TFDS data set of ArrayRecord shards, written and read without TensorFlow.

TFDS's own `download_and_prepare` writes in one process into a folder that it throws away when interrupted. So shards are written here,
with TFDS's feature encoding, file names and metadata, and `tfds.builder_from_directory` reads the folder like any other.
"""

import contextlib
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from gp_jax.data.record import Box, Record
from gp_jax.runtime.disk import write_text

if TYPE_CHECKING:  # TFDS takes seconds to import
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

NAME = "glimpse"
VERSION = "1.0.0"
SUFFIX = "array_record"
SIZES = "shards.json"
# One record per chunk: random access then reads no other records. Encoded pictures do not compress, and trying to takes most of the time.
WRITER_OPTIONS = "group_size:1,uncompressed"

Size = tuple[int, int]


@functools.cache
def features() -> "tfds.features.FeaturesDict":
    """The TFDS features of a stored record."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "dataset": text(),
            "question": text(),
            "answer": text(),
            "images": tfds.features.Sequence(text()),  # encoded files: TFDS's Text is any bytes, its Image would need decoding
            "sizes": tfds.features.Sequence(tfds.features.Tensor(shape=(2,), dtype=np.int32)),  # (width, height), upright
            "boxes": tfds.features.Sequence({"image": np.int32, "box": tfds.features.Tensor(shape=(4,), dtype=np.float32)}),
            "masks": tfds.features.Sequence(text()),  # encoded files; empty for a picture without one
        }
    )


@functools.cache
def _serializer() -> "ExampleSerializer":
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    return ExampleSerializer(features().get_serialized_info())


def _pixels(box: Box, size: Size) -> list[float]:
    """A box in pixels. Boxes are stored as float32, which holds whole pixels exactly but not shares: a box that ends at a token's edge must
    still end there when it is read."""
    (width, height), (x1, y1, x2, y2) = size, box
    return [x1 * width, y1 * height, x2 * width, y2 * height]


def encode(record: Record, sizes: Sequence[Size]) -> bytes:
    """A record as a tf.train.Example."""
    example = {
        "id": record.id,
        "dataset": record.dataset,
        "question": record.question,
        "answer": record.answer,
        "images": list(record.images),
        "sizes": [list(size) for size in sizes],
        "boxes": [{"image": i, "box": _pixels(box, sizes[i])} for i, boxes in enumerate(record.boxes) for box in boxes],
        "masks": [mask or b"" for mask in record.masks],
    }
    # Otherwise protobuf writes a map's fields in a random order that differs between processes.
    return _serializer().get_tf_example(features().encode_example(example)).SerializeToString(deterministic=True)


def decode(data: bytes) -> tuple[Record, tuple[Size, ...]]:
    """Inverse of `encode`. Raises: any exception of TFDS for bytes that are not such an example."""
    example = features().deserialize_example_np(data)
    boxes: list[list[Box]] = [[] for _ in example["images"]]
    for i, box in zip(example["boxes"]["image"], example["boxes"]["box"], strict=True):
        (width, height), (x1, y1, x2, y2) = example["sizes"][int(i)].tolist(), map(float, box)
        boxes[int(i)].append((x1 / width, y1 / height, x2 / width, y2 / height))
    record = Record(
        **{name: example[name].decode() for name in ("id", "dataset", "question", "answer")},
        images=tuple(example["images"]),
        boxes=tuple(map(tuple, boxes)),
        masks=tuple(mask or None for mask in example["masks"]),
    )
    return record, tuple((int(width), int(height)) for width, height in example["sizes"])


class ShardWriter:
    """Writes one ArrayRecord file, under a temporary name until it is complete."""

    def __init__(self, path: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path, self.examples, self.bytes = path, 0, 0
        self.scratch = path.with_name(f"{path.name}.partial")
        self.file = ArrayRecordWriter(str(self.scratch), WRITER_OPTIONS)

    def write(self, data: bytes) -> None:
        """Adds a record. Raises: RuntimeError when it cannot be written to disk."""
        self.file.write(data)
        self.examples += 1
        self.bytes += len(data)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.scratch.unlink, missing_ok=True)
            self.file.close()
            if kind is None:
                self.scratch.replace(self.path)


def shard_name(split: str, index: int, count: int) -> str:
    """The file name that TFDS expects."""
    return f"{NAME}-{split}.{SUFFIX}-{index:05d}-of-{count:05d}"


def write_metadata(folder: Path, splits: dict[str, list[tuple[int, int]]], description: str, homepage: str) -> None:
    """Writes shards.json, with the sizes of the shards' files, features.json and, last, dataset_info.json.

    Args: folder: holds the shards; splits: (examples, bytes) of every shard.
    """
    from tensorflow_datasets.core import dataset_info, file_adapters, naming
    from tensorflow_datasets.core import splits as splits_lib

    identity = dataset_info.DatasetIdentity(name=NAME, version=VERSION, data_dir=os.fspath(folder), module_name="")
    info = dataset_info.DatasetInfo(
        builder=identity, features=features(), description=description, homepage=homepage, disable_shuffling=True
    )
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    template = naming.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, filetype_suffix=SUFFIX)
    infos = [
        splits_lib.SplitInfo(
            name=split,
            shard_lengths=[examples for examples, _ in shards],
            num_bytes=sum(size for _, size in shards),
            filename_template=template.replace(split=split),
        )
        for split, shards in splits.items()
    ]
    info.set_splits(splits_lib.SplitDict(infos))
    names = [shard_name(split, number, len(shards)) for split, shards in splits.items() for number in range(len(shards))]
    write_text(folder / SIZES, json.dumps({name: (folder / name).stat().st_size for name in names}, indent=1) + "\n")
    scratch = folder / "metadata.partial"
    scratch.mkdir(exist_ok=True)
    info.write_to_directory(scratch)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == "dataset_info.json"):
        path.replace(folder / path.name)
    scratch.rmdir()
