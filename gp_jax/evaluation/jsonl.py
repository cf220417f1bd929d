"""Files with one JSON object per line that processes append to. Lines that a kill or a damaged disk left incomplete are skipped."""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gp_jax.errors import GlimpseError
from gp_jax.runtime.disk import aside, check_regular, kind_of, reading, set_aside, whole, writing

LONGEST = 4 << 20  # bytes; a longer line is taken as damaged


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Complete lines after the first `start` bytes, with their numbers counted from 1. A line that is too long is cut. No lines when
    there is no file.

    A last line without a line break, left by a killed run, is not returned. Raises: GlimpseError for a file that is not regular or cannot
    be read.
    """
    if kind_of(path) is None:
        return
    check_regular(path)
    with reading(path), path.open("rb") as file:
        file.seek(start)
        for number in itertools.count(1):
            line = rest = file.readline(LONGEST)
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST)
            if not rest:
                return
            yield number, line.removesuffix(b"\n")


def mend(path: Path, parse: Callable[[bytes], object]) -> str | None:
    """Removes the lines of a file that `parse` cannot read; the original is kept under another name. Returns: what was wrong, or None.

    No other process may write to the file. parse: raises GlimpseError for a damaged line.
    """
    if kind_of(path) in ("folder", "other"):
        return f"{path}: is not a regular file, not used; it is {set_aside(path).name} now"
    damaged = set()
    for number, line in read_lines(path):
        try:
            parse(line)
        except GlimpseError:
            damaged.add(number)
    if not damaged:
        return None
    place = aside(path)
    with whole(path) as scratch:
        shutil.copyfile(path, place)
        with scratch.open("wb") as file:
            file.writelines(line + b"\n" for number, line in read_lines(path) if number not in damaged)
    return f"{path}: damaged lines, not used: {len(damaged)}; the file as it was is {place.name} now"


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[str], None]]:
    """Gives a function that adds a line, which is on disk when it returns. An incomplete last line of a killed run is removed first.

    Lone surrogates are written as JSON escapes. Raises: GlimpseError that names the file, e.g. when the disk is full.
    """
    with writing(path):
        file = path.open("ab+")
    try:
        with writing(path):
            _drop_half(file)

        def append(line: str) -> None:
            with writing(path):
                file.write(line.encode("utf-8", "backslashreplace") + b"\n")
                file.flush()

        yield append
    finally:
        with contextlib.suppress(OSError):  # a failed write has been reported
            file.close()


def _drop_half(file: BinaryIO) -> None:
    """Cuts a file after its last line break."""
    end = file.seek(0, 2)
    while end:
        start = max(0, end - LONGEST)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            end = start + found + 1
            break
        end = start
    file.truncate(end)
