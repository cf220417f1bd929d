"""The command `gp-jax label`."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from gp_jax.errors import GlimpseError, one_line

if TYPE_CHECKING:
    from PIL import Image

    from gp_jax.vlm import GlimpseVLM

DONE = "labelled.jsonl"  # in the folder that is written: what is labelled so far


@dataclass(frozen=True)
class Label:
    """Write evidence for questions that have none: where the glimpse of a model looks, from its own map of the whole picture.

    gp-jax label ROWS.jsonl --images DIR --model DIR_OR_ID --out DIR/labels

    Reads rows with image (or images) and question; an answer is the model's own where there is none. Writes rows with three-state mask
    pictures: white where the map is sure of evidence, black where it is sure of none, grey in between, which has no part in the losses.
    `gp-jax prepare OUT/rows.jsonl --images DIR` reads them; with data.looks a glimpse then learns to see the same on small pictures. Masks
    are pictures, so the glimpse of one model can label for another. After an interruption the same command goes on.
    """

    rows: Annotated[Path, tyro.conf.Positional]
    """Questions: a JSON object a line."""
    images: Path | None = None
    """Folder of the pictures."""
    model: str = ""
    """Folder or Hugging Face Hub id of the base model."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse; by default the model folder's own."""
    out: Path | None = None
    """Folder to write, inside --images, where `gp-jax prepare` may read: rows.jsonl and masks."""
    high: float = 0.5
    """Importance above which a visual token is evidence."""
    low: float = 0.1
    """Importance below which it is none."""
    max_new_tokens: int = 64
    """Length limit of the model's own answers, in tokens."""
    dtype: str | None = None
    """Weights and activations: float32 or bfloat16. [default: as stored]"""

    def check(self) -> tuple[Path, Path]:
        """What can be wrong before anything is loaded. Returns: folder of the pictures, folder to write. Raises: GlimpseError."""
        if self.images is None or not self.images.is_dir():
            raise GlimpseError(f"--images {self.images}: is no folder of pictures")
        if self.out is None or not self.out.resolve().is_relative_to(self.images.resolve()):
            raise GlimpseError(f"--out {self.out}: must be a folder inside --images {self.images}")
        if (self.out / "rows.jsonl").exists():
            raise GlimpseError(f"--out {self.out}: holds rows.jsonl already")
        if not self.model:
            raise GlimpseError("--model is missing: a folder or a Hugging Face Hub id")
        if not 0 <= self.low <= self.high < 1:
            raise GlimpseError(f"--low {self.low} and --high {self.high} must be 0 <= low <= high < 1")
        if self.max_new_tokens < 1:
            raise GlimpseError(f"--max-new-tokens {self.max_new_tokens} must be positive")
        return self.images, self.out


def run(args: Label) -> None:
    """Runs `gp-jax label`."""
    images, out = args.check()
    rows = list(read_rows(args.rows))
    from gp_jax import GlimpseVLM
    from gp_jax.evaluation.jsonl import appending
    from gp_jax.processing.images import open_image
    from gp_jax.runtime.disk import whole, write_text, writing
    from gp_jax.runtime.exits import saving_as
    from gp_jax.runtime.progress import Progress

    done = read_done(out / DONE)
    keys = [key_of(number, row, args) for number, (_, row) in enumerate(rows)]
    vlm = GlimpseVLM.from_pretrained(args.model, glimpse=args.glimpse, dtype=args.dtype, progress=True)
    if vlm.glimpse_config is None:
        raise GlimpseError(f"{args.model}: has no glimpse, whose maps are the labels (--glimpse)")
    with writing(out):
        (out / "masks").mkdir(parents=True, exist_ok=True)
    left = [number for number, key in enumerate(keys) if key not in done]
    saved = saving_as(f"the rows so far are in {out / DONE}; the same command goes on")
    with saved, appending(out / DONE) as append, Progress(left, desc="labelling", unit="row") as bar:
        for number in bar:
            where, row = rows[number]
            pictures = [open_image(inside(images, path, where)) for path in row["images"]]
            answer, masks = labelled(vlm, pictures, row["question"], args)
            told = None  # not sure where to look
            if any((np.asarray(mask) == 255).any() for mask in masks):
                names = [out / "masks" / f"{number:06d}-{view}.png" for view in range(len(masks))]
                for name, mask in zip(names, masks, strict=True):
                    with whole(name) as scratch:
                        mask.save(scratch, format="png")
                own = {
                    "answer": row.get("answer") or answer,
                    "masks": [str(name.resolve().relative_to(images.resolve())) for name in names],
                }
                told = {name: value for name, value in row.items() if name not in ("boxes", "mask", "image")} | own
            done[keys[number]] = told
            append(json.dumps({"key": keys[number], "row": told}, ensure_ascii=False))
    found = [told for key in keys if (told := done[key]) is not None]
    write_text(out / "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    (out / DONE).unlink()
    print(f"wrote {out / 'rows.jsonl'}: {len(found)} rows; of {len(rows) - len(found)} others the glimpse is not sure where to look")


def key_of(number: int, row: dict[str, Any], args: Label) -> str:
    """What the label of a row depends on: another row or setting has another one."""
    settings = {name: str(value) for name, value in asdict(args).items() if name != "rows"}
    return hashlib.sha256(json.dumps([number, row, settings], sort_keys=True).encode()).hexdigest()[:32]


def read_done(path: Path) -> dict[str, dict[str, Any] | None]:
    """Rows that an interrupted command has labelled, by key. Lines that cannot be read are labelled again."""
    from gp_jax.evaluation.jsonl import read_lines

    found = {}
    for _, line in read_lines(path):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            found[entry["key"]] = entry["row"]
    return found


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their place in the file; `images` is a list. Raises: GlimpseError that names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GlimpseError(f"{path}: cannot be read ({one_line(error)})") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise GlimpseError(f"{where}: is not JSON ({one_line(error)})") from error
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise GlimpseError(f"{where}: has no question")
        images = row.get("images", row.get("image"))
        images = images if isinstance(images, list) else [images]
        if not images or not all(isinstance(one, str) and one for one in images):
            raise GlimpseError(f"{where}: image must be a path, images a list of paths")
        yield where, row | {"images": images}


def inside(images: Path, path: str, where: str) -> Path:
    """A picture's path. Raises: GlimpseError unless it is inside the folder of the pictures."""
    found = images / path
    if not found.resolve().is_relative_to(images.resolve()):
        raise GlimpseError(f"{where}: {path} is outside {images}")
    return found


def labelled(vlm: "GlimpseVLM", pictures: list, question: str, args: Label) -> "tuple[str, list[Image.Image]]":
    """The model's answer, and a mask picture per picture, in its size."""
    answer = vlm.answer(pictures, question, max_new_tokens=args.max_new_tokens)
    assert not isinstance(answer, list)  # one question has one answer
    maps = vlm.glimpse([pictures], [question])[0]
    views = len(maps) // len(pictures)  # of LLaVA-NeXT's two the detail is finer
    return answer.text, [
        three_states(own, args.low, args.high, size) for own, size in zip(maps[views - 1 :: views], (p.size for p in pictures), strict=True)
    ]


def three_states(importance: np.ndarray, low: float, high: float, size: tuple[int, int]) -> "Image.Image":
    """A mask picture of a map. importance: (rows, columns) in 0..1; size: width and height in pixels. Pixels in which visual tokens meet
    are black, so that a state does not reach the neighbours."""
    from PIL import Image

    from gp_jax.data.masks import UNKNOWN

    states = np.where(importance > high, 255, np.where(importance < low, 0, UNKNOWN)).astype(np.uint8)
    (row, inner_row), (column, inner_column) = (inner(n, pixels) for n, pixels in zip(states.shape, size[::-1], strict=True))
    return Image.fromarray(np.where(inner_row[:, None] & inner_column, states[row[:, None], column], 0).astype(np.uint8))


def inner(tokens: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """The visual token of every pixel along one side, and whether the pixel lies in it alone. (Tokens are wider than two pixels.)"""
    start = np.arange(pixels) * tokens
    return start // pixels, start // pixels == (start + tokens - 1) // pixels


def parse(argv: list[str]) -> Label:
    """Reads the command line."""
    return tyro.cli(Label, args=argv, prog="gp-jax label", config=(tyro.conf.HelptextFromCommentsOff,))
