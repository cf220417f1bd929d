"""The parts of a scene. Boxes are (x0, y0, x1, y1) in pixels; x1 and y1 are exclusive."""

from dataclasses import dataclass

from gp_jax.scenes.palette import COLORS, FILLS, SHAPES, Rgb

Box = tuple[int, int, int, int]

TAG_SIZE = (40, 26)
DIGIT_SIZE = (11, 20)
DIGIT_STEP = 12
CHART_SIDE = 40
CHART_MARGIN = 3  # pixels between the panel's edge and the bars, baseline included
DIRECTIONS = ("left", "right", "above", "below")


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart."""

    color: int  # in COLORS
    rgb: Rgb
    box: Box

    @property
    def height(self) -> int:
        """Height of the bar in pixels."""
        return self.box[3] - self.box[1]


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape, a tag, a chart or a tiny shape; alone in its cell."""

    group: str  # shape, tag, chart, tiny
    box: Box
    cell: tuple[int, int]  # column, row
    color: int = -1  # in COLORS; -1: a chart
    rgb: Rgb = (0, 0, 0)
    kind: int = -1  # in SHAPES; only of shapes and tiny shapes
    fill: int = 0  # in FILLS; only of shapes
    large: bool = False  # only of shapes
    number: str = ""  # only of tags
    bars: tuple[Bar, ...] = ()  # only of charts, from left to right

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def is_named(self) -> bool:
        """Whether questions can name it by color and shape."""
        return self.kind >= 0

    @property
    def color_word(self) -> str:
        """The color in words, such as red."""
        return COLORS[self.color]

    @property
    def kind_word(self) -> str:
        """The shape in words, such as star."""
        return SHAPES[self.kind]

    @property
    def fill_word(self) -> str:
        """The fill in words, such as striped."""
        return FILLS[self.fill]

    @property
    def digits(self) -> list[tuple[int, Box]]:
        """A tag's digits, from left to right, each with its box."""
        total = DIGIT_STEP * len(self.number) - (DIGIT_STEP - DIGIT_SIZE[0])
        x, y = self.box[0] + (TAG_SIZE[0] - total) // 2, self.box[1] + (TAG_SIZE[1] - DIGIT_SIZE[1]) // 2
        boxes = [(x + i * DIGIT_STEP, y, x + i * DIGIT_STEP + DIGIT_SIZE[0], y + DIGIT_SIZE[1]) for i in range(len(self.number))]
        return list(zip(map(int, self.number), boxes, strict=True))


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that a picture shows."""

    canvas: tuple[int, int]  # width, height in pixels
    things: tuple[Thing, ...]
    background: str  # family, one of draw.BACKGROUNDS
    seed: int  # of the background and the noise
    noise: int  # 3, 7 or 15: the largest value that is added to a pixel


def beside(things: tuple[Thing, ...], anchor: Thing) -> tuple[list[int], list[int], list[int], list[int]]:
    """Numbers of the things to the left, to the right, above and below: those whose rows (or columns) of pixels overlap the anchor's."""
    x0, y0, x1, y1 = anchor.box
    sides: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
    left, right, above, below = sides
    for i, thing in enumerate(things):
        if thing is anchor:
            continue
        a0, b0, a1, b1 = thing.box
        if b0 < y1 and y0 < b1:
            (left if a0 < x0 else right).append(i)
        if a0 < x1 and x0 < a1:
            (above if b0 < y0 else below).append(i)
    return sides


def neighbors(things: tuple[Thing, ...], anchor: Thing) -> tuple[int | None, ...]:
    """Per direction, the number of the only thing there; None if there is none, if there are several, or if it is not a shape."""
    return tuple(side[0] if len(side) == 1 and things[side[0]].group == "shape" else None for side in beside(things, anchor))
