"""One picture that shows both looks: python -m benchmarks.look_picture [PICTURE "QUESTION"] [--out docs/pictures/looks.png]

From the left: the first look's importance, the vision windows that the second look sees, the visual tokens that it keeps.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Args:
    """Draw both looks."""

    picture: Path = Path("docs/pictures/scene.png")
    """The picture."""
    question: str = "what number is on the black tag?"
    """The question."""
    model: str = "scenes"
    """Folder or Hub id of the model."""
    glimpse: str | None = None
    """Folder or Hub id of the glimpse."""
    out: Path = Path("docs/pictures/looks.png")
    """File to write."""


def main(args: Args) -> int:
    """Draws it. Returns: exit status."""
    import numpy as np
    from PIL import Image

    from gp_jax import GlimpseVLM, Look, Prune
    from gp_jax.processing.images import open_image, overlay, side_by_side

    vlm, picture = GlimpseVLM.from_pretrained(args.model, glimpse=args.glimpse), open_image(args.picture)
    answer = vlm.answer(picture, args.question, prune=Prune(look=Look()))
    if answer.look is None:
        sys.exit(f"{args.picture}: is too small for a first look")
    heat = Image.fromarray((255 * answer.maps[-1]).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    grey, orange = picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "#ff8000")
    shown = Image.composite(orange, grey, heat.point(lambda value: int(0.8 * value)))
    sheet = side_by_side([shown, overlay(picture, answer.viewed[-1]), overlay(picture, answer.keep[-1])])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out)
    first = sum(rows * columns for rows, columns in answer.look.grids)
    print(f"{args.question} {answer.text}: first look at {first} of {answer.total} visual tokens, {answer.seen_share:.1%} seen")
    print(f"{answer.kept} kept; wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.look_picture")))
