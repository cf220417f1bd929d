"""Reading untrusted files, and writing files atomically: a file that is read must be regular and of bounded size, and a file that is
written is renamed into place when it is complete.

An untrusted path may be a FIFO, a device, a folder, or an invalid name, and a file may be of any size and depth of nesting. All of that is
checked before anything is parsed.
"""

import contextlib
import itertools
import json
import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gp_jax.errors import GlimpseError, one_line, printable

if TYPE_CHECKING:
    from etils import epath

MAX_JSON = 8 << 20  # bytes; parsed, a file takes at worst about twenty times its size in memory
MAX_DEPTH = 64  # of nested lists and objects
NESTED = (dict, list)


def path_of(name: str | os.PathLike) -> Path:
    """A path with `~` resolved. Raises: GlimpseError for a name that is not a path."""
    try:
        path = Path(name).expanduser()
        os.fsencode(path)
    except (RuntimeError, ValueError, TypeError) as error:  # `~` of an unknown user, an unpaired surrogate, not text
        raise GlimpseError(f"{printable(name, 80)}: is not a path ({one_line(error)})") from error
    return path


def folder_of(name: str) -> "Path | epath.Path":
    """A local folder, or one of an object store. Raises: GlimpseError for a name that is neither."""
    if "://" not in name:
        return path_of(name)
    from etils import epath  # slow to import

    try:
        return epath.Path(name)
    except (KeyError, ValueError) as error:
        raise GlimpseError(f"{name}: is not a kind of store that is known here") from error


def kind_of(path: Path) -> str | None:
    """ "file", "folder" or "other" (a FIFO, a device, a socket); None: it does not exist.

    Raises: GlimpseError for an invalid name, or a path without permission.
    """
    try:
        if "://" in str(path):  # an object store has no FIFOs
            return "folder" if path.is_dir() else "file" if path.exists() else None
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name that is too long or has a null character, a cycle of links, no permission
        raise GlimpseError(f"{printable(path, 80)}: is not a path that can be read ({one_line(error, 60)})") from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def spelled(name: str | os.PathLike) -> Path:
    """The path of an existing file by its name in either Unicode normal form. An accented letter is one character (NFC) or two (NFD), and
    systems and archives convert between them: if the name as given does not exist, the other form of each part is tried.

    Raises: GlimpseError for a name that is not a path.
    """
    try:
        path = Path(name)
    except Exception as error:  # raised by an object that claims to be a path
        raise GlimpseError(f"a {type(name).__name__} is not a path ({one_line(error)})") from error
    if str(path).isascii() or kind_of(path) is not None:
        return path
    found = Path()
    for part in path.parts:
        forms = (found / form for form in (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)))
        found = next((form for form in forms if kind_of(form) is not None), found / part)
    return found


def check_regular(path: Path) -> None:
    """Raises: GlimpseError unless it is a regular file. Called before libraries that open the file themselves."""
    kind = kind_of(path)
    if kind != "file":
        wrong = {None: "file is missing", "folder": "is a folder, not a file", "other": "is not a regular file"}[kind]
        raise GlimpseError(f"{path}: {wrong}")


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content. Raises: GlimpseError when it is missing, not a regular file, longer than `most` bytes, or unreadable."""
    check_regular(path)
    with reading(path), path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()  # a sparse file may be of any size; files of object stores have no descriptor for fstat
        file.seek(0)
        content = file.read(size) if size <= most else b""  # read(n) allocates n bytes at once
    if size > most:
        raise GlimpseError(f"{path}: is larger than {most >> 10} KiB")
    return content


def read_text(path: Path, most: int = MAX_JSON) -> str:
    """A file in UTF-8. Raises: as `read_bytes`, and when it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise GlimpseError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def parse_json(text: str | bytes, where: object) -> Any:
    """A JSON value of bounded depth. Raises: GlimpseError that begins with `where`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GlimpseError(f"{where}: is not valid JSON ({one_line(error)})") from error
    level: list[dict | list] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one) if isinstance(inner, NESTED)]
        if not level:
            return value
    raise GlimpseError(f"{where}: is not valid JSON (more than {MAX_DEPTH} levels deep)")


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """A JSON object. Raises: GlimpseError when missing (if required) or damaged."""
    if not required and kind_of(path) is None:
        return {}
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise GlimpseError(f"{path}: must hold a JSON object")
    return content


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """For code that reads `path`: an error of the system becomes a GlimpseError that names it."""
    try:
        yield
    except OSError as error:
        raise GlimpseError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """For code that writes to `path`: an error of the system (full disk, no permission) becomes a GlimpseError that names the file."""
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else path
        raise GlimpseError(f"{named}: cannot be written ({error.strerror or one_line(error)})") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a scratch path to write to. It is renamed to `path` if the block succeeds, and deleted if it fails.

    Args: path: local or of etils.epath. Raises: GlimpseError that names it.
    """
    scratch = path.parent / f".{path.name}.partial"
    with writing(path):
        try:
            yield scratch
            scratch.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8 atomically. path: local or of etils.epath. Raises: GlimpseError that names it.

    Unpaired surrogates are written as escapes, as in JSON.
    """
    with whole(path) as scratch:
        scratch.write_bytes(text.encode("utf-8", "backslashreplace"))


def set_aside(path: Path) -> Path:
    """Renames a damaged file to NAME.damaged, NAME.damaged-2 and so on; nothing is deleted. Returns: its new path."""
    place = aside(path)
    with writing(path):
        path.rename(place)
    return place


def aside(path: Path) -> Path:
    """A free name beside a damaged file."""
    names = (path.with_name(f"{path.name}.damaged{f'-{n}' if n > 1 else ''}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))
