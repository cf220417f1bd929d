"""FLOPs and bytes of every stage of a request, from sizes alone: nothing is built, nothing runs.

FLOPs are those of matrix products (linear layers, attention); a multiply-add counts as two. XLA also counts norms, activations, rope and
softmax: about one percent more, in narrow models more. Bytes are a lower bound on a device's memory traffic: every weight once per program,
inputs and outputs of a product once, attention scores never (tiled kernels keep them on the chip).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gp_jax.buckets import Ladders
from gp_jax.config.model import GlimpseConfig, ModelConfig, TextConfig
from gp_jax.config.vision import ClipConfig, DeepStackConfig, Vision, VisionConfig
from gp_jax.errors import GlimpseError
from gp_jax.processing.windows import pack, pack_windows

SUMS = ("decoder prefill", "prefill", "total", "decode token", "kv cache")  # entries of `stages` that are not stages
Cuts = Sequence[tuple[int, float]]  # (after this layer, share of all visual tokens that stays)


@dataclass(frozen=True)
class Cost:
    """flops: of products, a multiply-add is two. bytes: moved to and from the device's memory."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Workload:
    """Sizes of one sample without padding; a batch is `batch` equal samples."""

    patches: int  # vision patches, merge_unit per visual token
    visual: int  # visual tokens
    text: int  # other tokens of the prompt, without glimpse rows
    new_tokens: int  # of the answer; the first comes out of prefill, the last is not fed
    batch: int = 1
    grids: tuple[tuple[int, int], ...] = ()  # (rows, columns) in visual tokens per image; none: one image of full windows
    ladders: Ladders | None = None  # count the padded buckets that the engine runs; None: the sizes as they are
    windows: tuple[tuple[int, ...], ...] = ()  # of a second look: per image, visual tokens of each window that is seen; none: all

    @classmethod
    def of(cls, vision: Vision, grids: Sequence[tuple[int, int]], text: int, new_tokens: int, batch: int = 1) -> "Workload":
        """The workload of images of these sizes, (rows, columns) in visual tokens, windows cut at their borders."""
        visual = sum(rows * columns for rows, columns in grids)
        return cls(visual * vision.merge_unit, visual, text, new_tokens, batch, tuple(grids))

    def seeing(self, vision: Vision, windows: Sequence[Sequence[int]]) -> "Workload":
        """The second look at some windows. windows: per image, the visual tokens of each window that is seen."""
        visual = sum(map(sum, windows))
        return replace(self, patches=visual * vision.merge_unit, visual=visual, windows=tuple(map(tuple, windows)))

    def check(self, config: ModelConfig, glimpse: GlimpseConfig | None, cuts: Cuts) -> None:
        """Raises: GlimpseError when sizes or cuts are impossible."""
        unit, depth, afters = config.vision.merge_unit, config.text.num_hidden_layers, [after for after, _ in cuts]
        rules = (
            (self.batch > 0 and self.text > 0 and self.visual >= 0 and self.new_tokens >= 0, "a size is not positive"),
            (self.patches == self.visual * unit, f"the vision tower has {unit} patches per visual token"),
            (bool(self.windows) or not self.grids or self.visual == sum(h * w for h, w in self.grids), "grids do not add up"),
            (not self.windows or self.visual == sum(map(sum, self.windows)), "windows do not add up to the visual tokens"),
            (afters == sorted(set(afters)) and {*afters} <= {*range(-1, depth)}, f"cuts must ascend, after layers -1..{depth - 1}"),
            (all(0 <= share <= 1 for _, share in cuts), "the share that a cut keeps must be in 0..1"),
            (not (glimpse and cuts) or glimpse.reduce_layer in afters, f"no cut is after reduce_layer={glimpse and glimpse.reduce_layer}"),
        )
        if wrong := [why for ok, why in rules if not ok]:
            raise GlimpseError(f"{'; '.join(wrong)}: {self}, cuts {list(cuts)}")


def _linear(rows: int, itemsize: int, *shapes: tuple[int, int], programs: int = 1) -> Cost:
    """Linear layers of these (in, out) sizes. programs: how often their weights are read."""
    weights, ends = sum(a * b for a, b in shapes), sum(a + b for a, b in shapes)
    return Cost(2 * rows * weights, itemsize * (rows * ends + programs * weights))


def _attention(pairs: int, rows: int, keys: int, heads: tuple[int, int], widths: int, itemsize: int) -> Cost:
    """pairs: of a query and a key; heads: of queries, of keys and values; widths: of a key and a value together."""
    return Cost(2 * pairs * heads[0] * widths, itemsize * widths * (rows * heads[0] + keys * heads[1]))


def segments(vision: Vision, work: Workload) -> tuple[list[int], list[int]]:
    """Patches of every attention window and every image; with ladders as executed: padded blocks of windows, a sample's images as one."""
    side, unit, whole = vision.window_side, vision.merge_unit, vision.merge_unit * vision.window_side**2
    if work.ladders:
        slots = pack_windows(work.grids, side)[0].size if work.grids else -(-work.visual // side**2) * side**2
        slots = pack([np.arange(size) for own in work.windows for size in own], side)[0].size if work.windows else slots
        blocks = work.ladders.patches.fit(slots * unit) // whole
        return [whole] * blocks, [whole * blocks]
    if work.windows:
        return [unit * size for own in work.windows for size in own], [unit * sum(own) for own in work.windows]
    if not work.grids:
        full, rest = divmod(work.patches, whole)
        return [whole] * full + [rest] * (rest > 0), [work.patches]
    parts = [[[min(side, length - i) for i in range(0, length, side)] for length in grid] for grid in work.grids]
    return [unit * h * w for heights, widths in parts for h in heights for w in widths], [unit * h * w for h, w in work.grids]


def windowed_tower(config: VisionConfig, work: Workload, batch: int, itemsize: int, deepest: int) -> tuple[Cost, Cost]:
    """Qwen2.5-VL's windowed ViT, all of whose blocks run, and its merger."""
    (windows, images), width, inner = segments(config, work), config.hidden_size, config.intermediate_size
    rows, group, heads = batch * sum(windows), width * config.merge_unit, (config.num_heads, config.num_heads)
    block = _linear(rows, itemsize, (width, 3 * width), (width, width), (width, inner), (width, inner), (inner, width))
    whole, local = (_attention(batch * sum(n * n for n in s), rows, rows, heads, 2 * config.head_dim, itemsize) for s in (images, windows))
    tower = _linear(rows, itemsize, (config.patch_dim, width)) + (block + local) * config.depth
    tower += (whole + local * -1) * len(config.fullatt_block_indexes)
    merger = _linear(rows // config.merge_unit, itemsize, (group, group), (group, config.out_hidden_size))
    return tower, merger


def deepstack_tower(config: DeepStackConfig, work: Workload, batch: int, itemsize: int, deepest: int) -> tuple[Cost, Cost]:
    """Qwen3-VL's ViT, all of whose blocks run, and its mergers: one for the visual tokens, one for each level of DeepStack."""
    (_, images), width, inner = segments(config, work), config.hidden_size, config.intermediate_size
    rows, group, heads = batch * sum(images), width * config.merge_unit, (config.num_heads, config.num_heads)
    block = _linear(rows, itemsize, (width, 3 * width), (width, width), (width, inner), (inner, width))
    block += _attention(batch * sum(n * n for n in images), rows, rows, heads, 2 * config.head_dim, itemsize)
    merger = _linear(rows // config.merge_unit, itemsize, (group, group), (group, config.out_hidden_size))
    tower = _linear(rows, itemsize, (config.patch_dim, width)) + block * config.depth
    return tower, merger * (1 + len(config.deepstack_visual_indexes))


def clip_tower(config: ClipConfig, work: Workload, batch: int, itemsize: int, deepest: int) -> tuple[Cost, Cost]:
    """CLIP's blocks up to the deepest hidden state that is read, and LLaVA's projector."""
    windows, _ = segments(config, work)
    full, width, inner, out = config.window_side**2, config.hidden_size, config.intermediate_size, config.out_hidden_size
    tiles = batch * sum(-(-n // full) for n in windows)  # the tower reads whole tiles, even if only a part of one becomes visual tokens
    rows, seen, heads = tiles * full, tiles * (full + 1), (config.num_heads, config.num_heads)
    block = _linear(seen, itemsize, (width, 3 * width), (width, width), (width, inner), (inner, width))
    block += _attention(tiles * (full + 1) ** 2, seen, seen, heads, 2 * config.head_dim, itemsize)
    tower = _linear(rows, itemsize, (config.patch_dim, width)) + block * max(config.select_layer, deepest)
    return tower, _linear(rows, itemsize, (width, out), (out, out))


def _vision(config: ModelConfig, work: Workload, batch: int, itemsize: int, deepest: int) -> dict[str, Cost]:
    """Tower, and merger or projector. deepest: the deepest hidden state that the predictor reads."""
    costs = config.family.cost.load()(config.vision, work, batch, itemsize, deepest) if work.visual else (Cost(), Cost())
    return dict(zip(("vision", "merger"), costs, strict=True))


def _layer(text: TextConfig, rows: int, pairs: int, keys: int, itemsize: int, programs: int = 1) -> Cost:
    """One decoder layer."""
    width, inner, heads = text.hidden_size, text.intermediate_size, (text.num_attention_heads, text.num_key_value_heads)
    query, key = (n * text.head_dim for n in heads)
    shapes = ((width, query), (width, key), (width, key), (query, width), (width, inner), (width, inner), (inner, width))
    return _linear(rows, itemsize, *shapes, programs=programs) + _attention(pairs, rows, keys, heads, 2 * text.head_dim, itemsize)


def _look(text: TextConfig, glimpse: GlimpseConfig, layers: range, rows: int, itemsize: int) -> Cost:
    """Glimpse vectors (float32), adding them to their rows, and recording the glimpse in the selected layers."""
    query, key = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    add = Cost(2 * rows * glimpse.rows * text.hidden_size, 2 * rows * text.hidden_size * itemsize)
    tap = Cost(2 * rows * query, rows * (key * itemsize + text.num_attention_heads * 4))
    vectors = _linear(len(glimpse.le_layers) * glimpse.rows, 4, (text.hidden_size, text.hidden_size)) * (glimpse.rows > 0)
    return vectors + add * len({*layers} & {*glimpse.le_layers}) + tap * len({*layers} & {*glimpse.selected_layers})


def _predictor(config: ModelConfig, glimpse: GlimpseConfig, work: Workload, batch: int) -> Cost:
    """The importance predictor, float32."""
    parts = [n // config.vision.merge_unit for n in segments(config.vision, work)[glimpse.attn_fuse_global]]
    rows, width, cond, blocks = batch * sum(parts), glimpse.attn_fuse_size, glimpse.cond_size, len(glimpse.selected_visual_layers)
    joint, value = width + cond, width + cond * glimpse.attn_fuse_use_flash_attn
    shapes = [(joint, joint)] * 2 + [(width, width)] * 2 + [(width, 2 * width)] * 2 + [(2 * width, width)]
    block = _linear(rows, 4, *shapes, *[(config.vision.hidden_size, cond)] * (cond > 0))
    block += _attention(batch * sum(n * n for n in parts), rows, rows, (1, 1), joint + value, 4)
    maps = len(glimpse.selected_layers) * config.text.num_attention_heads
    return block * blocks + _linear(rows, 4, (maps, width), *[(width, 1)] * (blocks if glimpse.deep_supervision else 1))


def stages(
    config: ModelConfig,
    glimpse: GlimpseConfig | None,
    work: Workload,
    cuts: Cuts = (),
    *,
    triangle: bool = False,
    itemsize: int = 2,
    past: bool = True,
) -> dict[str, Cost]:
    """What every stage costs, for the whole batch.

    Args:
        glimpse: ranks at the cut after its `reduce_layer`; None, or no cuts: no glimpse rows and no predictor.
        cuts: (after this layer, share of all visual tokens that stays), ascending; none: dense.
        past: a cut also cuts the cache so far; else every layer keeps what it saw.
        triangle: count causal attention of prefill over keys 0..t, as tiled kernels nearly do; else the full square that "einsum"
            executes. itemsize: bytes of a value of the base model.
    Returns: stages in order: "vision", "merger", "layers a..b" between cuts, "glimpse rows" (what they add to these layers, their
        vectors, the glimpse), "predictor", "compact", "head" (of the first new token), "decode" (all fed tokens). Then `SUMS`:
        "decoder prefill" (all before decode but vision and merger), "prefill", "total", and what is in no sum: "decode token" (mean)
        and "kv cache", whose bytes are held, not moved.
    """
    work.check(config, glimpse, cuts)
    cuts = cuts if work.visual else ()  # as in the engine: nothing is pruned without an image
    text, ladders, batch = config.text, work.ladders, work.ladders.batch.fit(work.batch) if work.ladders else work.batch
    deepest = max(glimpse.selected_visual_layers) if glimpse else 0
    costs = defaultdict(Cost, _vision(config, work, batch, itemsize, deepest))

    def layers(between: range, length: int) -> Cost:
        pairs, rows = length * (length + 1) // 2 if triangle else length * length, batch * length
        return _layer(text, rows, batch * pairs, rows, itemsize) * len(between)

    looking, visual, low, key = glimpse if cuts else None, work.visual, 0, text.num_key_value_heads * text.head_dim
    need = work.text + visual + (looking.rows if looking else 0)
    length, bare = (ladders.prompt.fit(n) if ladders else n for n in (need, work.text + visual))  # with and without glimpse rows
    held: list[int] = []  # rows in every layer's cache
    for after, share in (*cuts, (text.num_hidden_layers - 1, None)):
        between, low = range(low, after + 1), after + 1
        held = [length if past else n for n in held] + [length] * len(between)
        if between:
            costs[f"layers {between[0]}..{after}"] = layers(between, bare)
        if between and looking:
            costs["glimpse rows"] += layers(between, length) + layers(between, bare) * -1
            costs["glimpse rows"] += _look(text, looking, between, batch * length, itemsize)
        if share is None:
            break
        if looking and after == looking.reduce_layer:
            costs["predictor"], looking = _predictor(config, looking, work, batch) * (looking.attn_fuse_type != "mean"), None
        visual = min(visual, int(share * work.visual))
        need = work.text + visual + (looking.rows if looking else 0)
        length, bare = (ladders.kept_for(n, m) if ladders else n for n, m in ((need, length), (work.text + visual, bare)))
        costs["compact"] += Cost(0, 2 * itemsize * batch * length * (text.hidden_size + 2 * key * low * past))
    costs["head"] = _linear(batch, itemsize, (text.hidden_size, text.vocab_size))
    prefill, steps = sum(costs.values(), Cost()), max(0, work.new_tokens - 1)
    slots = ladders.decode.fit(work.new_tokens) if ladders else steps
    new = batch * (steps * slots if ladders else steps * (steps + 1) // 2)  # step s reads s new ones
    seen = [batch * steps * rows + new for rows in held]
    decode = sum((_layer(text, batch * steps, n, n, itemsize, programs=steps) for n in seen), costs["head"] * steps)
    reading = prefill + (costs["vision"] + costs["merger"]) * -1
    token = Cost(decode.flops // steps, decode.bytes // steps) if steps else Cost()
    cache = Cost(0, 2 * key * itemsize * batch * sum(rows + slots for rows in held))
    return dict(costs) | {"decode": decode} | dict(zip(SUMS, (reading, prefill, prefill + decode, token, cache), strict=True))


def first_look(config: ModelConfig, glimpse: GlimpseConfig, work: Workload, **options) -> Cost:
    """What a first look costs up to its map: vision, the layers with the glimpse, the predictor. work: at the size of the look; options: of
    `stages`."""
    cuts = [(glimpse.reduce_layer, 1.0)]
    found = stages(config, glimpse, work, cuts, **options)
    seen = ("vision", "merger", f"layers 0..{glimpse.reduce_layer}", "glimpse rows", "predictor")
    return sum((found[name] for name in seen if name in found), Cost())


def pruned_share(config: ModelConfig, glimpse: GlimpseConfig | None, work: Workload, cuts: Cuts, part: str = "total", **options) -> float:
    """FLOPs of a plan over those of the dense model. part: "decoder prefill", "prefill", "decode" or "total"; options: of `stages`."""
    return stages(config, glimpse, work, cuts, **options)[part].flops / stages(config, None, work, (), **options)[part].flops
