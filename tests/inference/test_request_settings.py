"""What `generate` and `Prune` take besides arrays: values that make no sense are one line that names the argument."""

import dataclasses

import jax
import numpy as np
import pytest

from gp_jax import GlimpseError, Look, Prune, inference_buckets
from gp_jax.inference.requests import resolve, sampling_settings
from gp_jax.pretrained.known import SIZES
from gp_jax.pruning.rule import limits, reference_mask

pytestmark = pytest.mark.quick

MODEL = SIZES["3b"]
SAMPLING = dict(temperature=0.0, top_k=0, top_p=1.0, seed=0, eos_token_id=None)
SHARES = np.array([0.5])
NEVER = [
    float("nan"),
    float("inf"),
    -7,
    10**30,
    10**400,
    10**5000,
    1j,
    "",
    "x",
    "7",
    b"x",
    "x\x1b[31m\n" * 10_000,
    {},
    {1: 2},
    [[1]],
    [None],
]
NEVER += [
    [2**40],
    ["a"],
    [1.5],
    [True],
    [0] * 5000,
    np.complex64(1),
    np.array([[1, 2]]),
    SHARES,
    np.array(["a"]),
    np.float16("nan"),
]
NEVER += [object(), len, range(3), {1, 2}, Ellipsis, (i for i in [1]), jax.numpy.ones(2)]
# What is no error, or not yet.
FREE = {"reduce_threshold": [-7], "after": [-7], "reference_masks": NEVER, "fixed_remain_ratio": [SHARES]}


def refusal(name: str, make) -> None:
    with pytest.raises(GlimpseError) as error:
        make()
    words = str(error.value)
    assert name in words and len(words) < 400 and "\n" not in words and "\x1b" not in words, words


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling(name):
    for value in (*NEVER, *([] if name == "eos_token_id" else [None]), True, 2**63):
        refusal(name, lambda value=value: sampling_settings(MODEL, **(SAMPLING | {name: value})))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Prune)])
def test_prune(name):
    for value in NEVER:
        if not any(value is free or (isinstance(value, int) and isinstance(free, int) and value == free) for free in FREE.get(name, ())):
            refusal(name, lambda value=value: Prune(**{name: value}))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Look) if field.name != "windows"])
def test_look(name):
    for value in NEVER:
        refusal(name, lambda value=value: Look(**{name: value}))


def test_prune_takes_numbers_of_numpy():
    given = dict(reduce_threshold=np.float32(0.25), fixed_remain_ratio=np.float64(0.5), min_remain_num=np.int64(3), seed=np.uint8(4))
    prune = Prune(**given, after=np.int32(5), released_batch_positions=np.bool_(False), anchor_positions=None)
    assert prune == Prune(0.25, None, 0.5, 3, (), None, False, "glimpse", 5, 4)
    assert [type(getattr(prune, name)) for name in ("reduce_threshold", "min_remain_num", "after")] == [float, int, int]
    assert limits(prune, np.array([8, 0]), np.zeros((2, 8), bool)).fixed.tolist() == [4, 0]


def test_sampling_takes_numbers_of_numpy():
    found = sampling_settings(MODEL, np.float32(0.5), np.int64(3), np.float64(0.5), np.int32(7), np.array([5, 6]))
    assert (found.temperature, found.top_k, found.top_p, found.eos.tolist()) == (0.5, 3, 0.5, [5, 6, *[-1] * 6])
    assert sampling_settings(MODEL, 1e-300, 0, 1, 0, 5).temperature == 0  # logits divided by it would leave float32


def test_what_is_no_prune():
    for value in (True, 5, "all", [], {}, object(), np.zeros((200, 200))):
        refusal("prune must be a Prune, None or 'auto'", lambda value=value: resolve(value, None, 28))


def test_what_is_no_mask():
    for value in (5, "mask", {1, 2}, object(), np.array(3), (i for i in [1])):
        refusal("reference_masks", lambda value=value: Prune(reference_masks=value))
    grids = [(1, 2), (1, 1)]
    for part in (*NEVER, None, np.array([None, 1])):
        for mask in (part, [part], [part, [1]], [[part, 1], [1]]):
            refusal("reference_masks[0]", lambda mask=mask: reference_mask(mask, grids, "reference_masks[0]"))


def test_sizes_of_an_exported_program():
    for value in (0, -1, 2**31, 2.5, True, None, "64", {}, [[64]], [0], [-1], [2**31], [2.5], [None], np.array([0.5])):
        refusal("visual_tokens", lambda value=value: inference_buckets(MODEL, visual_tokens=value))
        refusal("batch", lambda value=value: inference_buckets(MODEL, batch=value))
