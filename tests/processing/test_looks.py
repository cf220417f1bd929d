"""Samples of a first and a second look, on the host."""

import dataclasses
import math

import numpy as np
import pytest
import tiny_models as tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gp_jax.pretrained.hf_config import model_config
from gp_jax.processing.layout import read_samples
from gp_jax.processing.looks import FEWER, FirstSize, first_look, resized, second_look, source_tokens, window_sizes, windows_of_tokens

pytestmark = pytest.mark.quick

SAMPLES = [[5, (7, 9), 7], [2, (1, 23), 1, (6, 5), 9], [12], [1, (2, 2), 3]]


@pytest.fixture(scope="module")
def config():
    return model_config(tiny.hf_model().config.to_dict())


@pytest.fixture(scope="module")
def samples(config):
    return read_samples(config, **tiny.inputs(SAMPLES))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1), st.integers(1, 64))
def test_sizes_of_a_first_look(rows, columns, share, least):
    small = FirstSize(share, None, least).of((rows, columns))
    count, wanted = math.prod(small), max(least, int(share * (rows * columns)))
    assert small[0] <= rows and small[1] <= columns and 1 <= count <= max(wanted, 1)
    assert small == (rows, columns) or count < rows * columns
    if wanted >= rows * columns:
        assert small == (rows, columns)


def test_a_first_look_is_the_request_with_smaller_pictures(config, samples):
    """Ids, positions and order of a prompt that was asked about the small pictures, with their pixels in the order of processors."""
    size = FirstSize(0.25, None, 4)
    for sample, prompt in zip(samples[:2], SAMPLES[:2], strict=True):
        short = first_look(config, sample, size)
        assert short is not None and FEWER * short.count <= sample.count
        grids = iter(short.grids)
        asked = read_samples(config, **tiny.inputs([[next(grids) if isinstance(part, tuple) else part for part in prompt]]))[0]
        for name in ("positions", "image_token", "groups", "slots", "windows", "places", "tokens", "grids"):
            np.testing.assert_array_equal(getattr(short, name), getattr(asked, name), name)
        text = short.image_token < 0
        np.testing.assert_array_equal(short.ids[text], sample.ids[sample.image_token < 0])
        assert (short.ids[~text] == tiny.IMAGE).all() and short.pixels.shape == asked.pixels.shape
    assert first_look(config, samples[2], size) is None and first_look(config, samples[3], size) is None
    assert first_look(config, samples[0], FirstSize(0.6, None, 4)) is None, "more than half"


def test_pictures_are_resized_as_pictures(config):
    vision, rng = config.vision, np.random.default_rng(0)
    grid, small, side = (4, 6), (2, 3), vision.spatial_merge_size * vision.patch_size
    plane = rng.normal(size=(3, grid[0] * side, grid[1] * side)).astype(np.float32)

    def patches(planes: np.ndarray, rows: int, columns: int) -> np.ndarray:
        cut = planes.reshape(3, 1, rows, 2, 14, columns, 2, 14).repeat(2, axis=1)
        return cut.transpose(2, 5, 3, 6, 0, 1, 4, 7).reshape(-1, vision.patch_dim)

    expected = [Image.fromarray(own).resize((small[1] * side, small[0] * side), Image.Resampling.BICUBIC) for own in plane]
    found = resized(vision, patches(plane, *grid), grid, small)
    np.testing.assert_array_equal(found, patches(np.stack([np.asarray(own) for own in expected]), *small))
    moving = patches(plane, *grid).reshape(-1, 3, 2, 14, 14).copy()
    moving[:, :, 1] *= 2  # frames that differ are resized each
    twice = resized(vision, moving.reshape(-1, vision.patch_dim), grid, small).reshape(-1, 3, 2, 14, 14)
    np.testing.assert_allclose(twice[:, :, 1], 2 * twice[:, :, 0], atol=1e-5)


def test_every_token_has_the_cell_that_shows_its_middle(config, samples):
    sample = samples[1]
    short = first_look(config, sample, FirstSize(0.25, None, 4))
    source, first = source_tokens(sample, short), 0
    for view, (rows, columns) in enumerate(sample.grids):
        high, wide = short.grids[view]
        for row in range(rows):
            for column in range(columns):
                cell = int((row + 0.5) * high / rows) * wide + int((column + 0.5) * wide / columns)
                assert source[first] == cell + sum(math.prod(grid) for grid in short.grids[:view])
                first += 1
    assert set(source) == set(range(short.count)), "every cell is carried somewhere"


@given(st.integers(0, 3), st.integers(0, 2**31))
def test_second_looks_hold_their_windows_whole(config, samples, number, seed):
    sample = samples[number]
    seen = np.random.default_rng(seed).random(len(sample.places)) < 0.4
    short = second_look(config, sample, seen)
    np.testing.assert_array_equal(short.tokens, np.flatnonzero(seen[windows_of_tokens(sample)]) if sample.count else [])
    assert sum(map(sum, window_sizes(short))) == short.count and sorted(set(short.windows) - {-1}) == list(range(int(seen.sum())))
    unit = config.vision.merge_unit
    groups, whole = short.groups[short.slot_of_token], sample.groups[sample.slot_of_token][short.tokens]
    np.testing.assert_array_equal(groups, whole)
    assert short.pixels is sample.pixels and groups.size * unit <= sample.pixels.shape[0]
    values = np.arange(short.count) + 1
    assert short.on_grids(values, 0).sum() == values.sum() and short.on_grids(values, 0).size == sample.total
    assert [f.name for f in dataclasses.fields(short)] == [f.name for f in dataclasses.fields(sample)]
