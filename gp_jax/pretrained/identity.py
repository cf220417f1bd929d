"""The identity of a model's, adapter's or glimpse's folder: a digest of every file that can change an answer."""

from pathlib import Path

from gp_jax.pretrained.files import SIDE_FILES, digest_of, weights_digest
from gp_jax.pretrained.tower import PROCESSOR, local_tower_of
from gp_jax.runtime.disk import kind_of

# Files that are never read: documentation of a model, records of its training.
IGNORED = ("README*", "LICENSE*", "NOTICE*", "requirements*.txt", "trainer_state.json", "*_results.json")


def folder_identity(folder: Path) -> dict[str, str]:
    """The digests of everything in a folder that can change an answer, by file name; all weights are the entry "weights".

    Files that a user adds count too, unless they are known to be irrelevant. The vision tower that a LLaVA checkpoint refers to counts as
    "tower/..." if it is a local folder; a tower on the Hub is identified by its name in `config.json`.

    Raises: GlimpseError that names a file.
    """
    found = _digests(folder, SIDE_FILES)
    if tower := local_tower_of(folder):
        found |= {f"tower/{name}": digest for name, digest in _digests(tower, ("config.json", PROCESSOR)).items()}
    return found


def _digests(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    named = {path for pattern in patterns for path in folder.glob(pattern) if kind_of(path) == "file"}
    counted = sorted(path for path in named if not any(path.match(pattern) for pattern in IGNORED))
    return {"weights": weights_digest(folder)} | {path.relative_to(folder).as_posix(): digest_of(path) for path in counted}
