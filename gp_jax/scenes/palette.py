"""Words and colors of the scenes, and the pairs of color and shape that are held out."""

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
# At most 232 per channel: jitter and noise are added and must not overflow.
RGB = ((208, 24, 36), (228, 122, 12), (230, 214, 40), (26, 148, 52), (32, 84, 222), (138, 40, 184), (232, 232, 232), (16, 16, 18))
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
FILLS = ("plain", "striped", "dotted")
TINY_SHAPES = (0, 1, 2, 5)  # shapes that can be told apart at 14 px
JITTER = 8  # largest random change of a color, per channel

Rgb = tuple[int, int, int]


def held_out(color: int, shape: int) -> bool:
    """Whether this pair of color and shape occurs in the split test_ood only; every color has one such shape."""
    return (3 * color + shape) % 8 == 0


HELD_OUT = tuple((color, shape) for color in range(8) for shape in range(8) if held_out(color, shape))
HELD_OUT_TINY = tuple(pair for pair in HELD_OUT if pair[1] in TINY_SHAPES)


def luminance(rgb: Rgb) -> float:
    """Brightness of a color, 0..255."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def tone(rgb: Rgb) -> Rgb:
    """The second tone of a striped or dotted thing: the same hue, clearly brighter or darker."""
    bright = luminance(rgb) > 100
    red, green, blue = (value * 9 // 20 if bright else value + (240 - value) * 11 // 20 for value in rgb)
    return red, green, blue
