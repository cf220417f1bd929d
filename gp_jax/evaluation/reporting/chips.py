"""How plans look: the same color and shape in plots, tables and pictures, readable on light and dark ground."""

COLORS = ("#808890", "#3f8fd9", "#e0822e", "#2fa070", "#d0548c", "#9068d8", "#b59410", "#20a5b5", "#d9534f", "#8a9a30")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")  # matplotlib's
SHAPES = ("●", "■", "◆", "▲", "▼", "✚", "✖", "★")  # the same as characters


def chip(number: int) -> str:
    """HTML: the mark of plan `number`."""
    return f'<span class="chip" style="color:{COLORS[number % len(COLORS)]}" aria-hidden="true">{SHAPES[number % len(SHAPES)]}</span>'
