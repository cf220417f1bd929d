"""Writes the inference function as a folder that needs no gp_jax. `ahead.artifact.names` lists its files."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from orbax.checkpoint import v1 as ocp

from gp_jax import __version__
from gp_jax.ahead.artifact.facts import described
from gp_jax.ahead.artifact.names import EXAMPLE, EXPECTED, FACTS, PARAMS, PROCESSOR, PROGRAM, VENDOR
from gp_jax.ahead.artifact.readme import readme
from gp_jax.buckets import Ladders
from gp_jax.errors import GlimpseError
from gp_jax.inference.function import fitting_inputs, inference_fn, inference_inputs, inference_params
from gp_jax.ops.target import PLATFORMS
from gp_jax.pretrained import saving
from gp_jax.pretrained.tower import copy_beside
from gp_jax.processing.images import ImageLike
from gp_jax.pruning.rule import Prune
from gp_jax.vlm import GlimpseVLM

STEPS = ("lowering the program", "writing the parameters", "answering the example")


@dataclass(frozen=True)
class ExportSettings:
    """The settings of an export.

    platforms: names of `ops.target.PLATFORMS`; attention: as for `inference_fn`; plan, model: their names, for the README.
    """

    prune: Prune | None
    buckets: Ladders
    max_new_tokens: int
    platforms: tuple[str, ...] = PLATFORMS
    attention: str = "auto"
    plan: str = ""
    model: str = ""


def beside(folder: Path) -> tuple[Path, Path, Path]:
    """The folder itself, the scratch folder that is written first, and the folder that keeps an earlier export until it is replaced."""
    place = folder.resolve()
    return place, place.parent / f".{place.name}.partial", place.parent / f".{place.name}.old"


def is_export(folder: Path) -> bool:
    """Whether a folder may be replaced, because it holds an export or nothing."""
    return folder.is_dir() and ((folder / FACTS).is_file() or not any(folder.iterdir()))


def check_target(folder: Path) -> None:
    """Restores an earlier export that a killed run has moved away.

    Raises: GlimpseError unless the folder does not exist or holds an earlier export that can be replaced.
    """
    place, _, old = beside(folder)
    if old.exists():
        if not is_export(old):
            raise GlimpseError(f"--to {folder}: {old} is in the way")
        if place.exists():
            shutil.rmtree(old)  # the new export has replaced it
        else:
            old.rename(place)
    if place.exists():
        if not is_export(place):
            raise GlimpseError(f"--to {folder}: exists and is not an earlier export")
        if Path.cwd().resolve().is_relative_to(place):
            raise GlimpseError(f"--to {folder}: is where this command runs and cannot be replaced; name a folder in it")
        try:  # a mount point and a layer of a container's image cannot be renamed
            place.rename(old)
            old.rename(place)
        except OSError as error:
            raise GlimpseError(f"--to {folder}: cannot be replaced ({error.strerror or error}); name a folder in it") from error
    if importlib.util.find_spec("flatbuffers") is None:
        raise GlimpseError("jax.export needs the package flatbuffers: pip install flatbuffers")


def export(
    vlm: GlimpseVLM,
    program: ExportSettings,
    folder: Path,
    example: tuple[ImageLike, str] | None = None,
    shrink: bool = True,
    tell: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Writes the folder completely or not at all; an earlier export in it is replaced.

    Args: example: a picture and a question whose inputs and outputs are included; shrink: whether to scale the picture down if it has
        too many visual tokens for the program; tell: called with the name of every step that begins.
    Returns: the artifact's size in bytes, the example's answer, and whether the program gave the tokens of `generate` for it (None: the
        program cannot run on this machine).
    """
    check_target(folder)
    asked = example and ask(vlm, program, *example, shrink)  # before the long work, so that errors in the example come early
    place, scratch, old = beside(folder)
    shutil.rmtree(scratch, ignore_errors=True)  # left by an export that was killed
    try:
        scratch.mkdir(parents=True)
        write_processor(vlm, scratch / PROCESSOR)
        facts = describe(vlm, program)
        (scratch / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        tell(STEPS[0])
        exported, params, shapes = lower(vlm, program)
        (scratch / PROGRAM).write_bytes(exported.serialize())
        vendor = importlib.util.find_spec("flatbuffers")
        assert vendor is not None and vendor.origin is not None, "found by check_target"
        shutil.copytree(Path(vendor.origin).parent, scratch / VENDOR / "flatbuffers", ignore=shutil.ignore_patterns("__pycache__"))
        tell(STEPS[1])
        ocp.save(scratch / PARAMS, params)
        done = {}
        if asked and example:
            tell(STEPS[2])
            done = answer(vlm, program, exported, params, asked, scratch) | {"question": example[1]}
        (scratch / "README.md").write_text(readme(facts, shapes, done))
        if place.exists():
            place.rename(old)
        try:
            scratch.rename(place)
        except OSError:
            if old.exists():
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise GlimpseError(f"--to {folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return done | {"bytes": (place / PROGRAM).stat().st_size}


def lower(vlm: GlimpseVLM, program: ExportSettings) -> tuple[jax.export.Exported, dict, dict[str, jax.ShapeDtypeStruct]]:
    """The exported function, its parameters and the shapes of its inputs."""
    glimpse, attention = vlm.glimpse_config, program.attention
    infer = inference_fn(vlm.config, program.prune, program.buckets, program.max_new_tokens, glimpse=glimpse, attention=attention)
    params = inference_params(vlm.model)
    empty = inference_inputs([], vlm.config, vlm.glimpse_config, program.prune, program.buckets)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in empty.items()}
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)  # for one device, on whatever mesh they are
    return jax.export.export(jax.jit(infer), platforms=program.platforms)(specs, shapes), params, shapes


def ask(vlm: GlimpseVLM, program: ExportSettings, image: ImageLike, question: str, shrink: bool) -> tuple[dict, dict]:
    """The example as inputs of `generate` and of the program. Raises: GlimpseError when it does not fit one of them."""
    vlm.engine.ladders.decode.fit(program.max_new_tokens)
    return fitting_inputs(vlm.processor, [[image]], [question], vlm.glimpse_config, program.prune, program.buckets, shrink=shrink)


def answer(
    vlm: GlimpseVLM, program: ExportSettings, exported: jax.export.Exported, params: dict, asked: tuple[dict, dict], folder: Path
) -> dict[str, Any]:
    """Writes the example and its outputs: those of the program, or of `generate` if the program cannot run here. asked: from `ask`."""
    raw, inputs = asked
    done = vlm.generate(**raw, prune=program.prune, max_new_tokens=program.max_new_tokens)
    tokens = np.full((program.buckets.batch.rungs[-1], program.max_new_tokens), vlm.config.pad_token_id, np.int32)
    tokens[:1, : done.tokens.shape[1]] = done.tokens
    outputs: dict[str, Any] = {"tokens": tokens}
    equal = None
    if {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()) in program.platforms:
        outputs = {name: np.asarray(x) for name, x in jax.jit(exported.call)(params, inputs).items()}
        equal = bool((outputs["tokens"] == tokens).all())
        if not equal and vlm.model.decoder.embed_tokens.dtype == np.float32:
            raise GlimpseError("the exported program does not give the tokens of generate on the example; nothing was written")
    np.savez(folder / EXAMPLE, **inputs)
    np.savez(folder / EXPECTED, **outputs)
    return {"text": vlm.processor.text(done.tokens[0]), "equal": equal}


def write_processor(vlm: GlimpseVLM, folder: Path) -> None:
    """Writes the configuration (with the glimpse's), the tokenizer and the picture settings."""
    folder.mkdir()
    if vlm.folder:
        copy_beside(vlm.folder, folder)
    saving.write_config(vlm.model, vlm.hf_config, folder)


def describe(vlm: GlimpseVLM, program: ExportSettings) -> dict[str, Any]:
    """The fields of `export.json`."""
    return described(
        program.prune,
        program.buckets,
        gp_jax=__version__,
        jax=jax.__version__,
        model=program.model,
        glimpse=vlm.glimpse_config is not None,
        dtype=str(vlm.model.decoder.embed_tokens.dtype),
        plan=program.plan,
        max_new_tokens=program.max_new_tokens,
        platforms=list(program.platforms),
        attention=program.attention,
    )
