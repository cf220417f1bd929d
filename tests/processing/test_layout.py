"""Host-side arrays: window packing, positions, validation."""

import numpy as np
import pytest
import tiny_models as tiny
from hypothesis import given
from hypothesis import strategies as st

from gp_jax import GlimpseError
from gp_jax.config.vision import ClipConfig
from gp_jax.pretrained.hf_config import model_config
from gp_jax.processing.layout import prompt_input, read_samples, rope_positions, token_grid, vision_input
from gp_jax.processing.views import read_tiles
from gp_jax.processing.windows import pack_windows

pytestmark = pytest.mark.quick

GRIDS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def config():
    return model_config(tiny.hf_model().config.to_dict())


@given(GRIDS, st.integers(1, 5))
def test_windows_are_packed_whole_and_once(grids, side):
    slots, windows = pack_windows(grids, side)
    total = sum(r * c for r, c in grids)
    assert sorted(slots[slots >= 0]) == list(range(total))
    assert ((slots >= 0) == (windows >= 0)).all()
    cells = token_grid(grids)
    owner = {tuple(map(int, (i, r // side, c // side))): n for n, (i, r, c) in enumerate(cells)}
    homes: dict = {}
    for slot, token in enumerate(slots):
        if token >= 0:
            image, row, column = cells[token]
            key = (int(image), int(row) // side, int(column) // side)
            homes.setdefault(key, set()).add((slot // side**2, int(windows[slot])))
    assert all(len(places) == 1 for places in homes.values()), "a window was torn"
    assert len({place for places in homes.values() for place in places}) == len(owner), "two windows share a number"


@given(GRIDS, st.integers(1, 5))
def test_packing_wastes_less_than_half(grids, side):
    slots, _ = pack_windows(grids, side)
    assert slots.size < 2 * sum(r * c for r, c in grids) + side**2


def test_full_windows_waste_nothing():
    slots, _ = pack_windows([(16, 32), (8, 4)], 4)
    assert slots.size == 16 * 32 + 8 * 4


def test_one_axis_positions_just_count():
    np.testing.assert_array_equal(rope_positions(np.array([-1, 0, 1, -1]), [(1, 2)], 1), [[0, 1, 2, 3]])


def test_adjacent_images_keep_their_own_positions():
    positions = rope_positions(np.array([-1, 0, 1, 2, 3, 4, -1]), [(1, 3), (2, 1)], 3)
    np.testing.assert_array_equal(positions, [[0, 1, 1, 1, 4, 4, 6], [0, 1, 1, 1, 4, 5, 6], [0, 1, 2, 3, 4, 4, 6]])


def test_padding_side_does_not_matter(config):
    left, right = (read_samples(config, **tiny.inputs([[3, (2, 3), 4], [5]], left=side)) for side in (True, False))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_padded_arrays(config):
    samples = read_samples(config, **tiny.inputs([[3, (2, 3), 4], [5]]))
    prompt = prompt_input(samples, config, batch=4, length=32, glimpse_rows=2)
    assert prompt.valid.sum(axis=1).tolist() == [17, 7, 0, 0]
    np.testing.assert_array_equal(prompt.glimpse_row[1, 4:8], [-1, 0, 1, -1])
    np.testing.assert_array_equal(prompt.positions[:, 1, 5:7], [[5, 6]] * 3)
    assert prompt.tap_row[:2].tolist() == [16, 6]
    vision = vision_input(samples, config, batch=4, slots=8)
    assert (vision.token_image >= 0).sum(axis=1).tolist() == [6, 0, 0, 0]
    order = samples[0].slot_of_token
    np.testing.assert_array_equal(vision.token_hw[0][order], token_grid([(2, 3)])[:, 1:])
    np.testing.assert_array_equal(vision.patches[0].reshape(8, 4, -1)[order].reshape(24, -1), samples[0].pixels)
    np.testing.assert_array_equal(prompt.image_slot[0][prompt.image_slot[0] >= 0], order)


def broken(**changes):
    return tiny.inputs([[3, (2, 3), 4]]) | changes


BAD = {
    "pixel_values and image_grid_thw must be given together": broken(pixel_values=None),
    "holds 6 image tokens, but image_grid_thw gives 12": broken(
        image_grid_thw=np.array([[1, 4, 12]]), pixel_values=np.zeros((48, 1176), np.float32)
    ),
    "not a multiple of the 2 x 2 merge": broken(image_grid_thw=np.array([[1, 3, 8]])),
    "has 2 frames": broken(image_grid_thw=np.array([[2, 4, 6]])),
    "pixel_values must be": broken(pixel_values=np.zeros((24, 100), np.float32)),
    "attention_mask .* does not match": broken(attention_mask=np.ones((1, 3))),
    "image_grid_thw must be .* integers": broken(image_grid_thw=np.array([[1.0, 4, 6]])),
    "image_grid_thw must hold numbers": broken(image_grid_thw=np.array([[1, 4, None]])),
    "input_ids is not an array": broken(input_ids=[[1, 2], [3]]),
    "not finite": broken(pixel_values=np.full((24, 1176), np.nan, np.float32)),
    "input_ids must be": broken(input_ids=np.ones((1, 3))),
    "is empty": broken(attention_mask=np.zeros((1, 15))),
    "outside 0..95": broken(input_ids=np.full((1, 15), 99)),
    "video tokens": broken(input_ids=np.full((1, 15), tiny.VIDEO)),
    r"holds 2 images, but input_ids has tokens for 1": broken(
        image_grid_thw=np.array([[1, 4, 6], [1, 2, 2]]), pixel_values=np.zeros((28, 1176), np.float32)
    ),
}


class Raises:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("on\nanother device")


def no_rows(*grid: int, kind: type = np.int64) -> dict:
    return broken(image_grid_thw=np.array([[1, *grid]], kind), pixel_values=np.zeros((0, 1176), np.float32))


BAD |= {  # products that wrap, arrays that are none, and those that are much larger than what they hold
    r"pixel_values must be \(18446744073709551616, 1176\)": no_rows(2**32, 2**32),
    r"pixel_values must be \(36893488147419103232, 1176\)": no_rows(4, 2**63, kind=np.uint64),
    "is not a multiple of the 2 x 2 merge": no_rows(-(2**63), 4),
    "has -1 frames": broken(image_grid_thw=np.array([[-1, 4, 6]])),
    r"input_ids is not an array \(on another device\)": broken(input_ids=Raises()),
    "pixel_values must hold numbers, not complex64": broken(pixel_values=np.zeros((24, 1176), np.complex64)),
    "attention_mask must hold numbers, not datetime64": broken(attention_mask=np.zeros((1, 15), "M8[s]")),
    "input_ids must hold numbers, not object": broken(input_ids=np.full((1, 15), 3, object)),
    "pixel_values is masked in parts": broken(pixel_values=np.ma.masked_array(np.zeros((24, 1176)), mask=np.eye(24, 1176))),
    "attention_mask must hold 1 for tokens, 0 for padding": broken(attention_mask=np.full((1, 15), 2)),
    "attention_mask must hold 1 for tokens, 0 for padding and": broken(attention_mask=np.full((1, 15), -np.inf)),
    "input_ids repeats 8 bytes to an array of": broken(input_ids=np.broadcast_to(np.int64(3), (10**6, 10**6))),
    "pixel_values repeats 4 bytes to an array of": broken(pixel_values=np.broadcast_to(np.float32(0), (10**8, 1176))),
    "holds more than 4096 samples": broken(input_ids=np.broadcast_to(np.int8(3), (5000, 2)), attention_mask=None),
    "holds 3 images, but input_ids has tokens for 0 only": broken(
        input_ids=np.array([[3, 4]]), attention_mask=None, image_grid_thw=np.ones((3, 3), int), pixel_values=np.zeros((3, 1176))
    ),
    "pixel_values holds values that are not finite": broken(pixel_values=np.full((24, 1176), 1e300)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_inputs_name_the_argument(config, message):
    with pytest.raises(GlimpseError, match=message) as error:
        read_samples(config, **BAD[message])
    assert "\n" not in str(error.value)


def test_numbers_of_any_width_are_the_same_request(config):
    """Ids of 8 bits beside a vocabulary that they cannot count, masks of floats, pixels read backwards."""
    plain = tiny.inputs([[3, (2, 3), 4], [5]])
    want = read_samples(config, **plain)
    turned = np.ascontiguousarray(plain["pixel_values"][::-1])[::-1]
    names = ("input_ids", "attention_mask", "image_grid_thw")
    for kinds in ((np.int8, np.float32, np.int16), (np.uint64, bool, np.uint64), (np.int32, np.uint8, np.int32)):
        changed = {name: plain[name].astype(kind) for name, kind in zip(names, kinds, strict=True)}
        for a, b in zip(want, read_samples(config, **changed, pixel_values=turned), strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.pixels, b.pixels)
    huge = plain["input_ids"].astype(np.uint64)
    huge[plain["attention_mask"] == 1] = 2**64 - 7
    with pytest.raises(GlimpseError, match="outside 0"):
        read_samples(config, **plain | {"input_ids": huge})


def test_torn_image_is_refused(config):
    batch = tiny.inputs([[3, (2, 3), 4]])
    ids = batch["input_ids"][0]
    first = int(np.flatnonzero(ids == tiny.IMAGE)[0])
    ids[[first, 0]] = ids[[0, first]]
    with pytest.raises(GlimpseError, match="do not stand together"):
        read_samples(config, **batch)


TILES = ClipConfig(2, 8, 8, 2, 8, 1, image_size=28, pinpoints=((28, 56), (56, 28)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_sizes": [[2**62, 2**62]]}, "image_sizes must hold sides of 1 to 16777216 pixels, not 4611686018427387904 to"),
        ({"image_sizes": np.array([[1, 2**64 - 1]], np.uint64)}, "image_sizes must hold sides"),
        ({"image_sizes": [[0, 5]]}, "image_sizes must hold sides"),
        ({"image_sizes": [[-(2**63), 5]]}, "image_sizes must hold sides"),
        ({"image_sizes": [[1.5, 2]]}, r"image_sizes must be \(images, 2\) integers"),
        ({"image_sizes": []}, r"image_sizes must be \(images, 2\) integers"),
        ({"image_sizes": [[1, 2], [3]]}, "image_sizes is not an array"),
        ({"image_sizes": [[1, 2], [3, 4]]}, r"pixel_values must be \(2, tiles, 3, 28, 28\)"),
        ({"pixel_values": np.zeros((1, 1, 3, 28, 28))}, r"pixel_values\[0\] holds 1 tiles, a picture of 50 x 20 has 3"),
        ({"pixel_values": np.broadcast_to(np.float32(0), (1, 10**6, 3, 28, 28))}, "pixel_values repeats 4 bytes"),
        ({"pixel_values": np.full((1, 3, 3, 28, 28), np.inf)}, "pixel_values holds values that are not finite"),
        ({"tokens": 0}, "pixel_values holds 1 images, but input_ids has tokens for 0 only"),
    ],
    ids=str,
)
def test_bad_tiles_name_the_argument(changes, message):
    good = {"tokens": 12, "pixel_values": np.zeros((1, 3, 3, 28, 28)), "image_grid_thw": None, "image_sizes": [[20, 50]]}
    assert len(read_tiles(TILES, **good)) == 1
    with pytest.raises(GlimpseError, match=message):
        read_tiles(TILES, **good | changes)
