"""What `gp_jax.flops` leaves out, as XLA counts it on a CPU: everything that is not a product.

A share of 1 / width or so: nothing beside the products of large models, several percent of small ones. XLA counts one FLOP per element
of every operation (exponentials and the like none), again in every operation that a fusion repeats it in.
"""

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.config.vision import ClipConfig
from gp_jax.flops import Cuts, Workload, segments

SCORE = 8  # per score of attention: scale, mask (three, which a fusion repeats for every head), maximum, difference, sum, choice
NORM, RESIDUALS, GATE = 4, 2, 5  # per element: square, sum, two factors; per row and channel; of an activation and its gate


def attention(pairs: int, rows: int, heads: tuple[int, int], width: int, rope: bool = True) -> int:
    """Scores, the division of the output, and rope: three per element, and cosines and sines through an identity (see `ops.rope`).

    Args: pairs: of a query and a key; heads: of queries, of keys and values; width: of a head.
    """
    turned = 3 * rows * sum(heads) * width + 4 * 2 * rows * (width // 2) ** 2
    return SCORE * heads[0] * pairs + rows * heads[0] * width + turned * rope


def block(rows: int, width: int, inner: int, biases: int) -> int:
    """Norms, residuals, the gated MLP and biases of a block, less attention."""
    return rows * ((2 * NORM + RESIDUALS) * width + GATE * inner + biases)


def besides(config: ModelConfig, glimpse: GlimpseConfig | None, work: Workload, cuts: Cuts) -> dict[str, int]:
    """Operations of a stage besides its products, for the stages whose attention is large; no buckets, "einsum" attention.

    Args: as of `flops.stages`. Returns: for "vision" (merger included) and the layers between cuts, by the names of `stages`.
    """
    text, vision, batch, found = config.text, config.vision, work.batch, {}
    rows, depth = batch * work.patches, vision.depth
    if isinstance(vision, ClipConfig):
        depth = max(vision.select_layer, *(glimpse.selected_visual_layers if glimpse else (0,)))
        pairs = rows * (vision.window_side**2 + 1) * depth
    else:
        windows, images = (batch * sum(n * n for n in lengths) for lengths in segments(vision, work))
        whole = len(vision.fullatt_block_indexes)
        pairs = windows * (depth - whole) + images * whole
    width, heads = vision.hidden_size, (vision.num_heads, vision.num_heads)
    found["vision"] = attention(pairs, rows * depth, heads, width // vision.num_heads, not isinstance(vision, ClipConfig))
    found["vision"] += depth * block(rows, width, vision.intermediate_size, 4 * width + 2 * vision.intermediate_size)
    found["vision"] += rows * (NORM + GATE) * width
    heads, low, visual = (text.num_attention_heads, text.num_key_value_heads), 0, work.visual
    looking = glimpse if cuts else None
    for after, share in (*cuts, (text.num_hidden_layers - 1, 1.0)):
        layers, n = after + 1 - low, work.text + visual + (looking.rows if looking else 0)
        biases = (heads[0] + 2 * heads[1]) * text.head_dim * text.attention_bias
        one = attention(batch * n * n, batch * n, heads, text.head_dim) + block(batch * n, text.hidden_size, text.intermediate_size, biases)
        found[f"layers {low}..{after}"] = layers * one
        low, looking, visual = after + 1, None, min(visual, int(share * work.visual))
    return found
