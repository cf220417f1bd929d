"""Parts of the server that need no model: settings, sizes, growing texts, the order of pasted pictures, the cache's bound."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp_jax import GlimpseError
from gp_jax.processing.windows import pack_windows
from gp_jax.serving.jobs import PictureKey
from gp_jax.serving.lengths import lengths_of
from gp_jax.serving.preparing import mask_of
from gp_jax.serving.replies import Growing
from gp_jax.serving.settings import ServerSettings, size
from gp_jax.serving.vision_cache import VisionCache, paste, sources
from gp_jax.tiny import CONFIG
from gp_jax.trees import VisionFeatures

pytestmark = pytest.mark.quick


def test_sizes():
    assert [size(text, "x") for text in ("0", "5", "1K", "1.5M", "2GiB", "3 g")[:5]] == [0, 5, 1024, 1572864, 2**31]
    for text in ("", "x", "-1", "1Q", "nan", "1e3", "9" * 40):
        with pytest.raises(GlimpseError, match="--x"):
            size(text, "x")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(model=""), "MODEL"),
        (dict(kv_memory="much"), "--kv-memory"),
        (dict(max_prompt=3), "--max-prompt"),
        (dict(gap=0), "--gap"),
        (dict(timeout=float("nan")), "--timeout"),
        (dict(port=70_000), "--port"),
        (dict(capacities=(256, 128)), "--capacities"),
        (dict(dtype="int8"), "--dtype"),
        (dict(max_visual_tokens=4096), "--max-visual-tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed, words):
    with pytest.raises(GlimpseError, match=words):
        ServerSettings(**{"model": "scenes", **changed})


def test_lengths_fit_the_budget():
    from gp_jax.pretrained.hf_config import model_config

    config = model_config(CONFIG, {})
    found = lengths_of(ServerSettings("tiny", max_prompt=500, kv_memory="8M", max_new_tokens=64), config, 4, 1)
    row = 2 * 6 * 2 * 16 * 4
    assert found.capacities == (128, 512) and found.place == tuple(row * (capacity + 64) for capacity in found.capacities)
    for sizes, place in zip(found.sizes, found.place, strict=True):
        assert sizes[:2] == (1, 4) and sizes[-1] == min(16, found.budget // place)
    assert set(found.capacities) <= set(found.ladders.prompt.rungs), "prompts and caches of one length share programs"
    many = lengths_of(ServerSettings("tiny", max_prompt=500, kv_memory="8M", max_new_tokens=64, rungs="many"), config, 4, 1)
    assert many.capacities == (128, 256, 512) and many.sizes[0] == (1, 2, 4, 8, 16)
    assert set(found.ladders.prompt.rungs) < set(many.ladders.prompt.rungs)
    with pytest.raises(GlimpseError, match="--kv-memory 1K does not hold one prompt of 512 rows"):
        lengths_of(ServerSettings("tiny", max_prompt=500, kv_memory="1K"), config, 4, 1)
    with pytest.raises(GlimpseError, match="--capacities end at 64"):
        lengths_of(ServerSettings("tiny", max_prompt=500, capacities=(64,)), config, 4, 1)


class Letters:
    """A processor whose tokens are bytes."""

    def text(self, tokens):
        return bytes(tokens.tolist()).decode("utf-8", "replace").strip()


@given(
    st.text(st.sampled_from("ab é\n€"), max_size=20),
    st.lists(st.integers(1, 4), min_size=60, max_size=60),  # 20 letters have up to 60 bytes
    st.sampled_from(["", "ab", "é a"]),
)
def test_a_growing_text_is_the_whole_however_it_arrives(text, steps, stop):
    data, shown = np.frombuffer(text.encode(), np.uint8), ""
    growing, at = Growing(Letters(), [stop] if stop else []), 0
    for step in steps:
        if at < data.size and not growing.stopped:
            shown += growing.add(data[at : at + step].astype(np.int32))
            at += step
    shown += growing.rest()
    one = Growing(Letters(), [stop] if stop else [])
    assert shown == (one.add(data.astype(np.int32)) + one.rest() if data.size else "") and one.tokens == growing.tokens
    assert shown == growing.text and not (stop and stop in shown)


@settings(max_examples=8)  # every one compiles operations of its own shapes
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3), st.integers(2, 4))
def test_pasting_puts_every_patch_group_where_the_prompt_has_it(grids, side):
    class Packed:
        def __init__(self, own):
            self.groups = pack_windows(own, side)[0]

    whole, alone, first = Packed(grids), [Packed([grid]) for grid in grids], 0
    slots, page = whole.groups.size + side * side, None
    for picture, source in zip(alone, sources(whole, alone, slots), strict=True):
        named = np.where(picture.groups >= 0, picture.groups + first, -1)[None, :, None].astype(np.float32)
        page = paste(page, VisionFeatures(named, ()), source, slots=slots)
        first += int((picture.groups >= 0).sum())
    found = np.asarray(page.tokens)[0, : whole.groups.size, 0]
    np.testing.assert_array_equal(found[whole.groups >= 0], whole.groups[whole.groups >= 0])


def test_a_mask_names_its_picture_and_keeps_every_digit():
    """Views of two pictures, of which the second has two; float32 importance comes back from JSON as it was."""
    importance = np.random.default_rng(0).random(20, np.float32) ** 9
    pictures = [PictureKey(b"a", None), PictureKey(b"b", None, ((0, 0, 1, 1), (-0.25, 0, 1.25, 1)))]
    job = SimpleNamespace(sample=SimpleNamespace(grids=((2, 3), (2, 2), (2, 5))), pictures=pictures)
    masks = json.loads(json.dumps(mask_of(job, importance > 0.01, importance)))
    assert [(mask["picture"], mask["area"][0]) for mask in masks] == [(0, 0), (1, 0), (1, -0.25)]
    found = np.concatenate([np.float32(mask["importance"]).reshape(-1) for mask in masks])
    np.testing.assert_array_equal(found, importance)
    assert sum(np.sum(mask["keep"]) for mask in masks) == (importance > 0.01).sum()


def test_the_cache_is_bounded_and_forgets_what_was_used_last():
    cache = VisionCache(100)
    for name in b"a", b"b":
        cache.put((name, ()), VisionFeatures(np.zeros((1, 10), np.float32), ()))
    assert cache.get((b"a", ())) is not None and cache.held == 80
    cache.put((b"c", ()), VisionFeatures(np.zeros((1, 10), np.float32), ()))
    assert cache.get((b"b", ())) is None and cache.get((b"a", ())) is not None and cache.held == 80
    cache.put((b"d", ()), VisionFeatures(np.zeros((1, 100), np.float32), ()))
    assert cache.held == 80 and (cache.hits, cache.misses) == (2, 1)
