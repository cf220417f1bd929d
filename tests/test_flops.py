"""FLOPs and bytes from sizes: against XLA's own count, by hand, and the published figure."""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.flops import beside, model_named, xla
from benchmarks.scaling import Args, verdict
from gp_jax import GlimpseError, Ladder, Ladders
from gp_jax.ahead.passes import Request, costs_of, passes
from gp_jax.config.model import GlimpseConfig, ModelConfig, TextConfig
from gp_jax.config.vision import ClipConfig, DeepStackConfig, VisionConfig
from gp_jax.flops import SUMS, Cost, Workload, pruned_share, segments, stages
from gp_jax.inference.engine import Engine
from gp_jax.pretrained.known import SIZES
from gp_jax.pretrained.params import abstract_model
from gp_jax.processing.windows import pack_windows
from gp_jax.training.build import glimpse_config
from gp_jax.training.settings import GlimpseSettings

# Wide enough for products to dominate: everything else is what XLA counts and we do not.
WIDE = ModelConfig(
    "qwen2_5_vl",
    VisionConfig(2, 256, 1024, 2, 256, fullatt_block_indexes=(1,)),
    TextConfig(1024, 256, 1024, 2, 2, 1, 1e-6, 1e6, mrope_section=(16, 24, 24)),
    image_token_id=1,
)
GLIMPSE = GlimpseConfig((0,), 0, le_layers=(0, 1), attn_fuse_size=256, visual_cond_size=256, attn_fuse_global=True, deep_supervision=False)
V2 = {"attn_fuse_type": "AttnFuserV2", "attn_fuse_global": False, "le_layers": (), "le_length": 0}
FLASH = {"attn_fuse_use_flash_attn": True, "selected_visual_layers": (1, 0)}
SMALL = ModelConfig(
    "qwen2_5_vl", VisionConfig(2, 8, 16, 2, 8, fullatt_block_indexes=(1,)), TextConfig(10, 8, 16, 2, 2, 1, 1e-6, 1e6), image_token_id=1
)


@pytest.mark.parametrize(
    "glimpse, cuts, batch",
    [
        (None, (), 2),
        (None, ((0, 0.25),), 1),
        (dataclasses.replace(GLIMPSE, selected_visual_layers=(1,)), ((0, 0.25),), 2),
        (dataclasses.replace(GLIMPSE, **FLASH), ((0, 0.5),), 1),
        (dataclasses.replace(GLIMPSE, selected_visual_layers=(1,), **V2), ((0, 0.0),), 1),
    ],
    ids=["dense", "given", "V1", "flash", "V2"],
)
def test_equals_what_xla_counts(glimpse, cuts, batch):
    work = Workload(256, 64, 32, 2, batch)
    glimpse = glimpse and glimpse.validate(WIDE)
    found = xla(WIDE, glimpse, work, cuts)
    assert len(found) == 4 + len(cuts) + (glimpse is not None)
    for name, (ours, theirs) in found.items():
        assert theirs * 0.98 < ours <= theirs * 1.0001, (name, ours / theirs)


@pytest.mark.parametrize("deep", [1, 2])
def test_a_tower_of_tiles_equals_what_xla_counts(deep):
    """It runs as far as the projector or a condition reads it."""
    vision = ClipConfig(3, 256, 1024, 2, 256, select_layer=1, image_size=112, hidden_act="relu")
    text = TextConfig(1024, 256, 1024, 2, 2, 2, 1e-6, 1e4, attention_bias=False)
    config = ModelConfig("llava", vision, text, image_token_id=1)
    glimpse = dataclasses.replace(GLIMPSE, selected_visual_layers=(deep,)).validate(config)
    for name, (ours, theirs) in xla(config, glimpse, Workload(128, 128, 32, 2, 2), [(0, 0.25)]).items():
        assert theirs * 0.98 < ours <= theirs * 1.0001, (name, ours / theirs)


def test_deepstack_and_a_head_width_of_its_own_equal_what_xla_counts():
    vision = DeepStackConfig(2, 256, 1024, 2, 256, num_position_embeddings=16, deepstack_visual_indexes=(0, 1))
    text = TextConfig(1024, 256, 1024, 2, 2, 1, 1e-6, 1e6, (32, 16, 16), attention_bias=False, head_size=128, qk_norm=True)
    text = dataclasses.replace(text, mrope_interleaved=True, num_attention_heads=4, num_key_value_heads=2)
    config = ModelConfig("qwen3_vl", vision, text, image_token_id=1)
    glimpse = dataclasses.replace(GLIMPSE, selected_visual_layers=(1,)).validate(config)
    for name, (ours, theirs) in xla(config, glimpse, Workload(256, 64, 32, 2, 2), [(0, 0.25)]).items():
        assert theirs * 0.97 < ours <= theirs * 1.0001, (name, ours / theirs)


def test_by_hand():
    """D 8, 2 layers, 2 heads of 4 on 1, MLP 16: 64 + 2 x 32 + 64 + 3 x 128 = 576 weights a layer. One image of 4 tokens, 16 patches."""
    work = Workload.of(SMALL.vision, [(1, 4)], text=2, new_tokens=3)
    dense = stages(SMALL, None, work)
    assert dense["layers 0..1"].flops == 2 * (2 * 6 * 576 + 4 * 6 * 6 * 8)
    assert stages(SMALL, None, work, triangle=True)["layers 0..1"].flops == 2 * (2 * 6 * 576 + 4 * 21 * 8)
    assert dense["vision"].flops == 2 * 16 * 1176 * 8 + 2 * (2 * 16 * 640 + 4 * 16 * 16 * 8)
    assert dense["merger"].flops == 2 * 4 * (32 * 32 + 32 * 8)
    assert dense["head"] == Cost(2 * 8 * 10, 2 * (8 + 80 + 10))
    cut = stages(SMALL, None, work, [(0, 0.5)])
    assert cut["layers 0..0"].flops * 2 == dense["layers 0..1"].flops
    assert cut["layers 1..1"].flops == 2 * 4 * 576 + 4 * 4 * 4 * 8
    # Two tokens are fed. They see 4 + 1 and 4 + 2 keys.
    assert cut["decode"].flops == 2 * (2 * 2 * 576 + 160) + 2 * 4 * (5 + 6) * 8
    read = 2 * (576 + 3 * (8 + 16) + 2 * (8 + 8) + 2 * (8 + 4)) + 2 * 2 * 8  # weights, what enters and leaves a product, q and output
    assert cut["decode"].bytes == 2 * (2 * read + cut["head"].bytes) + 2 * 2 * 2 * 4 * (5 + 6)
    assert cut["kv cache"].bytes == 2 * 2 * 2 * 4 * (4 + 2)
    assert cut["compact"].bytes == 2 * 2 * 4 * (8 + 2 * 4)
    apart = stages(SMALL, None, work, [(0, 0.5)], past=False)  # the first layer keeps its six rows
    assert apart["kv cache"].bytes == 2 * 2 * 4 * ((6 + 2) + (4 + 2)) and apart["compact"].bytes == 2 * 2 * 4 * 8
    assert apart["decode"].flops == cut["decode"].flops + 4 * 8 * 2 * 2 and apart["prefill"].flops == cut["prefill"].flops
    assert cut["prefill"] == sum((c for name, c in cut.items() if name not in ("decode", *SUMS)), Cost())
    assert cut["total"] == cut["prefill"] + cut["decode"]
    assert cut["decoder prefill"].flops == cut["prefill"].flops - cut["vision"].flops - cut["merger"].flops


def test_segments_are_windows_and_images():
    windows, images = segments(SMALL.vision, Workload.of(SMALL.vision, [(5, 6), (4, 4)], 1, 1))
    assert sorted(windows) == [8, 16, 32, 64, 64] and images == [120, 64]
    assert segments(SMALL.vision, Workload(72, 18, 1, 1)) == ([64, 8], [72])


def test_ladders_count_what_the_engine_pads_to():
    ladders = Ladders(
        Ladder("patches", (100, 300)), Ladder("prompt", (40, 64)), Ladder("kept", (24, 32)), Ladder("decode", (8,)), Ladder("batch", (1, 4))
    )
    glimpse = dataclasses.replace(GLIMPSE, selected_visual_layers=(1,)).validate(WIDE)
    grids = [(5, 6)]
    work = Workload.of(WIDE.vision, grids, text=10, new_tokens=5, batch=3)
    padded = stages(WIDE, glimpse, dataclasses.replace(work, ladders=ladders), [(0, 0.3)])
    engine = Engine(abstract_model(WIDE, glimpse, jnp.float32), ladders)
    slots = engine.slots_of(ladders.patches.fit(pack_windows(grids, 4)[0].size * 4))
    same = stages(WIDE, None, Workload(4 * slots, slots, 1, 1, 4))
    assert (padded["vision"], padded["merger"]) == (same["vision"], same["merger"])
    # 40 rows without the glimpse row, 41 with it, 10 + 9 are kept: rungs 40, 64 and 24.
    first, second = (stages(WIDE, None, Workload(0, 0, n, 1, 4), ())["layers 0..1"].flops // 2 for n in (40, 24))
    assert padded["layers 0..0"].flops == first
    assert padded["glimpse rows"].flops > stages(WIDE, None, Workload(0, 0, 64, 1, 4))["layers 0..1"].flops // 2 - first
    assert padded["layers 1..1"].flops == second
    assert padded["kv cache"].bytes == 2 * 2 * 128 * 2 * 4 * (24 + 8)


def test_more_kept_costs_more_and_everything_kept_is_dense():
    work = Workload(4000, 1000, 50, 20)
    shares = [n / 20 for n in range(21)]
    for part in ("decoder prefill", "prefill", "decode", "total"):
        found = [pruned_share(WIDE, None, work, [(0, share)], part) for share in shares]
        assert found == sorted(found) and found[0] < found[-1] == 1.0
    deep = [stages(SIZES["7b"], None, work, [(after, 0.1)])["total"].flops for after in (-1, 5, 18, 27)]
    assert deep == sorted(deep)
    glimpse = dataclasses.replace(GLIMPSE, selected_visual_layers=(1,)).validate(WIDE)
    assert pruned_share(WIDE, glimpse, work, [(0, 1.0)]) > 1


def test_a_glimpse_behind_another_cut():
    config, glimpse = model_named("7b", None)
    work = Workload(4000, 1000, 50, 1)
    costs = stages(config, glimpse, work, [(-1, 0.5), (18, 0.1)])
    assert costs["layers 0..18"].flops * 28 == stages(config, None, Workload(0, 0, 550, 1))["layers 0..27"].flops * 19
    assert costs["predictor"] == stages(config, glimpse, work, [(18, 0.1)])["predictor"]
    assert costs["layers 19..27"] == stages(config, glimpse, work, [(18, 0.1)])["layers 19..27"]
    mean = dataclasses.replace(glimpse, attn_fuse_type="mean")
    assert stages(config, mean, work, [(18, 0.1)])["predictor"] == Cost()
    assert "predictor" not in stages(config, glimpse, Workload(0, 0, 50, 1), [(18, 0.1)])


@pytest.mark.parametrize(
    "name, count",
    [
        ("3b", 3754622976),
        ("7b", 8292166656),
        ("32b", 33452718336),
        ("72b", 73410777344),
        ("qwen3-vl-4b", 4437815808),
        ("qwen3-vl-8b", 8767123696),
    ],
)
def test_known_sizes_have_the_published_parameters(name, count):
    config, depth = SIZES[name], SIZES[name].text.num_hidden_layers
    short = dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=1))
    model = abstract_model(short, None, jnp.bfloat16)
    whole, layer = (sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (model, model.decoder.layers[0]))
    assert whole + (depth - 1) * layer == count


def test_published_share_of_prefill():
    """A100, DocVQA, 7B: 69.1 % of the prefill FLOPs (the language model's; 4.0 % of the cache is left)."""
    config, glimpse = model_named("7b", None)
    assert glimpse.reduce_layer == 18
    work = Workload(16000, 4000, 64, 128)
    assert pruned_share(config, glimpse, work, [(18, 0.074)], "decoder prefill") == pytest.approx(0.708, abs=1e-3)
    assert pruned_share(config, glimpse, work, [(18, 0.03)], "decoder prefill") == pytest.approx(0.691, abs=0.005)
    assert pruned_share(config, glimpse, work, [(18, 0.074)], "prefill") == pytest.approx(0.796, abs=1e-3)


@pytest.mark.parametrize(
    "work, cuts, message",
    [
        (Workload(10, 4, 2, 1), [], "4 patches per visual token"),
        (Workload(16, 4, 0, 1), [], "not positive"),
        (Workload(16, 4, 2, 1, grids=((1, 5),)), [], "grids"),
        (Workload(16, 4, 2, 1), [(1, 0.5), (0, 0.2)], "ascend"),
        (Workload(16, 4, 2, 1), [(2, 0.5)], "-1..1"),
        (Workload(16, 4, 2, 1), [(0, 1.5)], "share"),
        (Workload(16, 4, 2, 1), [(1, 0.5)], "reduce_layer=0"),
    ],
)
def test_what_cannot_be_is_said(work, cuts, message):
    with pytest.raises(GlimpseError, match=message):
        stages(SMALL, GLIMPSE, work, cuts)


def test_what_is_no_product_stands_beside():
    counted = {"vision + merger": (90, 100.0), "layers 0..5 + glimpse rows": (50, 60.0), "head": (7, 7.0)}
    rest = {"vision": 9, "layers 0..5": 10, "layers 6..7": 1}
    assert beside(counted, rest) == {
        "vision + merger": (90, 9, 100.0),
        "layers 0..5 + glimpse rows": (50, 10, 60.0),
        "head": (7, 0, 7.0),
    }


@pytest.mark.parametrize("share, least, most", [(0.25, 0.36, 0.40), (0.0625, 0.23, 0.27)])
def test_two_looks_of_7b(share, least, most):
    """Vision and prefill at 4,096 visual tokens with a quarter of the windows, over dense: by sizes, with and without padding."""
    config, request = SIZES["7b"], Request(1, 4096, 64, 2, look_share=share)
    glimpse = glimpse_config(GlimpseSettings(), config)
    for ladders in (None, Ladders()):
        work = request.workload(config.vision, ladders)
        reading = {}
        for name in ("look", "glimpse", "dense"):
            found = costs_of(config, glimpse, passes(name, request, config, glimpse, work), 2)
            reading[name] = sum(found[part].flops for part in ("vision", "merger", "decoder prefill"))
        assert least < reading["look"] / reading["dense"] < most and 0.75 < reading["glimpse"] / reading["dense"] < 0.85


def test_a_second_look_costs_what_its_windows_cost():
    """Linear layers by patches, attention by windows and, in blocks with full attention, by what is seen of a picture."""
    vision = WIDE.vision
    whole, part = Workload.of(vision, [(8, 8)], 8, 1), Workload.of(vision, [(8, 8)], 8, 1).seeing(vision, [[16, 16]])
    assert segments(vision, part) == ([64, 64], [128]) and segments(vision, whole) == ([64] * 4, [256])
    few, many = (stages(WIDE, None, work)["vision"].flops for work in (part, whole))
    rows, width, inner = 128, vision.hidden_size, vision.intermediate_size
    linear = 2 * rows * (vision.patch_dim * width + vision.depth * (4 * width * width + 3 * width * inner))
    assert few == linear + 4 * width * (2 * 64**2 + 128**2) and few < many / 2 < 2 * few
    with pytest.raises(GlimpseError, match="windows do not add up"):
        stages(WIDE, None, dataclasses.replace(part, visual=31, patches=124))


def test_slower_than_dense_is_beyond_the_noise_at_every_retention():
    entries = [dict(request="1 x 256", kept=kept, ratio=ratio, noise=0.05) for kept, ratio in (("dense", 1), ("0.25", 0.9), ("0.9", 1.04))]
    assert "slower than dense: 0 of 2" in next(verdict(entries)) and "1 have a ratio above 1" in next(verdict(entries))
    lines = list(verdict([*entries, dict(request="4 x 64", kept="1.0", ratio=1.06, noise=0.05)]))
    assert "slower than dense: 1 of 3" in lines[0] and lines[1:] == ["  4 x 64, 100.0% kept: 1.06 x dense, noise 5.0%"]
    assert {0.75, 0.9, 1.0} <= {*Args.retentions}
