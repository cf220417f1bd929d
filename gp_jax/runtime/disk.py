"""Files from strangers, and files that must be whole: regular and of bounded size when read, renamed into place when written.

A path may be a FIFO, a device or a folder where a file is meant, a name that no file system takes, or text of any length and depth. All
of that is found before a byte is parsed.
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

MAX_JSON = 8 << 20  # bytes: parsed, the worst of texts takes some twenty times its length
MAX_DEPTH = 64  # of nested lists and objects
NESTED = (dict, list)


def path_of(name: str | os.PathLike) -> Path:
    """A path with `~` resolved. Raises: GlimpseError for a name that is none."""
    try:
        path = Path(name).expanduser()
        os.fsencode(path)
    except (RuntimeError, ValueError, TypeError) as error:  # `~` of an unknown user, half a surrogate, not text
        raise GlimpseError(f"{printable(name, 80)}: is not a path ({one_line(error)})") from error
    return path


def folder_of(name: str) -> "Path | epath.Path":
    """A local folder, or one of an object store. Raises: GlimpseError for what is neither."""
    if "://" not in name:
        return path_of(name)
    from etils import epath  # slow to import

    try:
        return epath.Path(name)
    except (KeyError, ValueError) as error:
        raise GlimpseError(f"{name}: is not a kind of store that is known here") from error


def kind_of(path: Path) -> str | None:
    """ "file", "folder" or "other" (a FIFO, a device, a socket); None: nothing is there.

    Raises: GlimpseError for a name that no file can have, or one that must not be looked at.
    """
    try:
        if "://" in str(path):  # an object store has no FIFOs
            return "folder" if path.is_dir() else "file" if path.exists() else None
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name too long, with a null character, a circle of links, no permission
        raise GlimpseError(f"{printable(path, 80)}: is not a path that can be read ({one_line(error, 60)})") from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def spelled(name: str | os.PathLike) -> Path:
    """The path of what is there under a name. A letter with an accent is one character or two (Unicode's normal forms NFC and NFD), and
    systems and archives change one into the other: where nothing has the name as it is given, the other spelling of each part is tried.

    Raises: GlimpseError for a name that is none.
    """
    try:
        path = Path(name)
    except Exception as error:  # of an object that says it is a path
        raise GlimpseError(f"a {type(name).__name__} is not a path ({one_line(error)})") from error
    if str(path).isascii() or kind_of(path) is not None:
        return path
    found = Path()
    for part in path.parts:
        forms = (found / form for form in (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)))
        found = next((form for form in forms if kind_of(form) is not None), found / part)
    return found


def check_regular(path: Path) -> None:
    """Raises: GlimpseError unless a regular file is there. Whatever opens files of its own accord is called behind this."""
    kind = kind_of(path)
    if kind != "file":
        wrong = {None: "file is missing", "folder": "is a folder, not a file", "other": "is not a regular file"}[kind]
        raise GlimpseError(f"{path}: {wrong}")


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content. Raises: GlimpseError when it is missing, no regular file, longer than `most`, or cannot be read."""
    check_regular(path)
    with reading(path), path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()  # a file of nothing but holes may be of any size; files of object stores have no number to ask by
        file.seek(0)
        content = file.read(size) if size <= most else b""  # Python makes room for as many bytes as it is asked for
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
    """Reads inside: what the system says against it is one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise GlimpseError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Writes inside: a full disk or a folder without permission is one line that names `path`, or the file that the system names."""
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else path
        raise GlimpseError(f"{named}: cannot be written ({error.strerror or one_line(error)})") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives the place to write a file to; it takes its name when the block ends well, and otherwise nothing is left of it.

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
    """A file in UTF-8, whole or not at all. path: local or of etils.epath. Raises: GlimpseError that names it.

    Halves of surrogates are written as JSON escapes them.
    """
    with whole(path) as scratch:
        scratch.write_bytes(text.encode("utf-8", "backslashreplace"))


def set_aside(path: Path) -> Path:
    """Renames what cannot be used to NAME.damaged, or NAME.damaged-2 and so on: nothing is deleted. Returns: its place now."""
    place = aside(path)
    with writing(path):
        path.rename(place)
    return place


def aside(path: Path) -> Path:
    """A free name beside a damaged file."""
    names = (path.with_name(f"{path.name}.damaged{f'-{n}' if n > 1 else ''}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))
