"""The command `gp-jax merge`."""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from gp_jax.errors import GlimpseError

CARD = "README.md"
SIGN = "written by `gp-jax merge`"  # in the model card of a folder that may be replaced


@dataclass(frozen=True)
class Merge:
    """Add a LoRA adapter to the weights of its base and write both as a plain checkpoint.

    gp-jax merge MODEL --adapter DIR_OR_ID --to DIR

    The sum is computed in float32 and rounded once to the type of the base's weights; biases stay as they are. Tokenizer, processor and
    generation files are copied from the base.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder or Hugging Face Hub id of the base model."""
    adapter: str = ""
    """Folder or Hub id of the adapter: adapter_config.json and adapter_model.safetensors, as PEFT writes them; scenes-plus has its own."""
    to: Path | None = None
    """Folder to write: a new or empty one, or that of an earlier merge, which is replaced."""
    keep_glimpse: bool = False
    """Keep the glimpse of the model folder. It was trained on the base; a merged model needs a new one."""

    def check(self) -> None:
        """Checks everything that can be checked before anything is loaded. Raises: GlimpseError."""
        from gp_jax.pretrained.files import parts_of

        if parts_of(self.model, None, self.adapter or None)[2] is None:
            raise GlimpseError("--adapter is missing: the folder or Hub id of the LoRA adapter")
        if self.to is None:
            raise GlimpseError("--to is missing: the folder to write")


def check_target(folder: Path, *sources: Path) -> None:
    """Raises: GlimpseError unless nothing is lost when a model is written to a folder. sources: folders that are read."""
    from gp_jax.runtime.disk import kind_of

    kind = kind_of(folder)
    if kind is None:
        return
    if kind != "folder":
        raise GlimpseError(f"--to {folder}: exists and is not a folder")
    if any(folder.resolve() == source.resolve() for source in sources):
        raise GlimpseError(f"--to {folder}: is what is read; name another folder")
    if any(folder.iterdir()) and not is_merged(folder / CARD):
        raise GlimpseError(f"--to {folder}: is not empty and holds no earlier merge; name a new folder")


def is_merged(card: Path) -> bool:
    """Whether a model card is one that this command has written."""
    from gp_jax.runtime.disk import kind_of, read_text

    try:
        return kind_of(card) == "file" and SIGN in read_text(card)
    except GlimpseError:
        return False


def card(base: str, adapter: str) -> str:
    """The model card of a merged model."""
    from gp_jax import __version__

    said = f"`{base}` with the LoRA adapter `{adapter}` added to its weights, {SIGN} of gp_jax {__version__}."
    return f"---\nbase_model: {json.dumps(base)}\n---\n\n{said}\n"


def run(args: Merge) -> None:
    """Runs `gp-jax merge`."""
    args.check()
    assert args.to is not None, "checked"
    import jax.numpy as jnp

    from gp_jax.models.adapter import adapted, add
    from gp_jax.pretrained import files
    from gp_jax.pretrained.adapters import ADAPTER_FILES
    from gp_jax.pretrained.checkpoint import Checkpoint
    from gp_jax.pretrained.saving import plain_hf_config, save_model
    from gp_jax.runtime.disk import path_of
    from gp_jax.runtime.progress import Progress

    to = path_of(args.to)
    base, _, adapter = files.parts_of(args.model, None, args.adapter or None)
    assert adapter is not None, "checked"
    stored = Checkpoint.find(args.model, adapter=args.adapter or None)
    check_target(to, stored.folder, files.find_folder(adapter, ADAPTER_FILES))
    left_out = stored.glimpse is not None and not args.keep_glimpse
    if left_out:
        stored = dataclasses.replace(stored, hf=plain_hf_config(stored.hf), glimpse=None, glimpse_source=None)
    bar = partial(Progress, leave=False)
    model = stored.load(progress=partial(bar, desc="loading weights", unit="tensor"))
    layers = sorted(adapted(model), key=lambda layer: layer[0])
    for path, linear in bar(layers, desc="merging", unit="layer"):
        add(linear)
        if not jnp.isfinite(linear.weight[...]).all():
            raise GlimpseError(f"{path}: base and adapter together are too large for {linear.weight.dtype}")
    text = {CARD: card(str(base), args.adapter or args.model)}
    writing = partial(bar, desc="writing", unit="file")
    save_model(model, stored.hf, to, source=stored.folder, nested=stored.nested, progress=writing, more=text)
    print(f"wrote {to}: the adapter is merged into {len(layers)} layers, in {model.decoder.embed_tokens.dtype}")
    if left_out:
        print("the glimpse of the model folder is left out: a merged model needs a new one (--keep-glimpse copies it)")


def parse(argv: list[str]) -> Merge:
    """Reads the command line."""
    return tyro.cli(Merge, args=argv, prog="gp-jax merge", config=(tyro.conf.HelptextFromCommentsOff,))
