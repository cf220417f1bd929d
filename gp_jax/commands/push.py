"""The command `gp-jax push`."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gp_jax.errors import GlimpseError, one_line, shown

NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")  # OWNER/NAME
WORD = re.compile(r"[\w.-]+")
FOLDER = "hub"  # of a run: what was published


@dataclass(frozen=True)
class Push:
    """Publish what a run of train.py has exported on the Hugging Face Hub, with a model card made from the run's own figures.

    gp-jax push RUN --to OWNER/NAME

    RUN/hub is written first: the exported files and README.md, the card. --dry-run ends there. Log in with `hf auth login`.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run (--out of train.py)."""
    to: str = ""
    """Repository on the Hub, OWNER/NAME; it is made if it does not exist."""
    base: str | None = None
    """Hub id of the base model. [default: --model of the run]"""
    license: str | None = None
    """Licence of the weights, as the Hub spells it, e.g. apache-2.0. [default: not said]"""
    evaluation: Path | None = None
    """Folder that eval.py wrote with this glimpse: its table goes into the card."""
    private: bool = False
    """Make a private repository."""
    dry_run: bool = False
    """Write RUN/hub and upload nothing."""

    def check(self) -> None:
        """Checks everything that can be checked without reading files. Raises: GlimpseError."""
        if not NAME.fullmatch(self.to):
            raise GlimpseError(f"--to {shown(self.to)} must be OWNER/NAME" if self.to else "--to is missing: the repository, OWNER/NAME")
        if self.base is not None and not NAME.fullmatch(self.base):
            raise GlimpseError(f"--base {shown(self.base)} must be OWNER/NAME")
        if self.license is not None and not WORD.fullmatch(self.license):
            raise GlimpseError(f"--license {shown(self.license)} must be one word, e.g. apache-2.0")


def prepare(args: Push) -> Path:
    """Writes RUN/hub. Returns: it. Raises: GlimpseError that names the file at fault."""
    from gp_jax.pretrained.files import staged
    from gp_jax.runtime.disk import kind_of
    from gp_jax.training.card import exported, model_card

    if kind_of(args.run) != "folder":
        raise GlimpseError(f"{args.run}: no such folder of a run")
    card = model_card(args.run, args.to, base=args.base, license=args.license, evaluation=args.evaluation)
    with staged(args.run / FOLDER) as scratch:
        for path in exported(args.run)[1]:
            shutil.copyfile(path, scratch / path.name)
        (scratch / "README.md").write_text(card)
    return args.run / FOLDER


def run(args: Push) -> None:
    """Runs `gp-jax push`."""
    args.check()
    folder = prepare(args)
    print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if args.dry_run:
        return
    from huggingface_hub import HfApi  # slow to import

    try:
        api = HfApi(library_name="gp_jax")
        url = api.create_repo(args.to, private=args.private or None, exist_ok=True)
        api.upload_folder(repo_id=args.to, folder_path=folder, commit_message="gp-jax push")
    except Exception as error:  # the Hub client raises many types of errors
        why = f"{type(error).__name__}: {one_line(error)}"
        raise GlimpseError(f"--to {args.to}: the Hugging Face Hub did not take it ({why}); {folder} stays") from error
    print(f"published {url}")


def parse(argv: list[str]) -> Push:
    """Reads the command line."""
    return tyro.cli(Push, args=argv, prog="gp-jax push", config=(tyro.conf.HelptextFromCommentsOff,))
