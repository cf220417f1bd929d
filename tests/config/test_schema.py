"""Types with bounds: what they take, what they refuse, and in which words."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
import pytest
from pydantic import Field

from gp_jax import GlimpseError
from gp_jax.config.choices import Activation
from gp_jax.config.schema import Count, Flag, Number, Seed, Several, Share, TokenId, checked, one
from gp_jax.ops import layers
from gp_jax.pretrained.known import SIZES

pytestmark = pytest.mark.quick

PAIR = Annotated[Several[Count], Field(min_length=2, max_length=2)]
WORDS = [
    (Count, True, "x=True: must be a whole number"),
    (Count, "8", "x='8': must be a whole number"),
    (Count, 2.0, "x=2.0: must be a whole number"),
    (Count, None, "x=None: must be a whole number"),
    (Count, -1, "x=-1: must be at least 0"),
    (Count, 2**31, "x=2147483648: must be at most 2147483647"),
    (Count, 10**5000, "x=<int>: must be at most 2147483647"),
    (Seed, 2**70, "x=1180591620717411303424: must be less than 9223372036854775808"),
    (Share, float("nan"), "x=nan: must be a finite number"),
    (Share, float("inf"), "x=inf: must be a finite number"),
    (Share, 1.5, "x=1.5: must be at most 1"),
    (Share, [0.5], "x=[0.5]: must be a number"),
    (Number, 10**400, "must be a number"),
    (Annotated[float, Field(gt=0)], 0, "x=0: must be greater than 0"),
    (Annotated[float, Field(ge=1e-30)], 0.0, "x=0.0: must be at least 1e-30"),
    (Flag, 1, "x=1: must be true or false"),
    (str, ["a"], "x=['a']: must be text"),
    (dict[str, int], "a", "x='a': must be an object"),
    (Literal["a", "b"], {}, "x={}: must be 'a' or 'b'"),
    (Several[TokenId], 7, "x=7: must be a list"),
    (Several[TokenId], "ab", "x='ab': must be a list"),
    (Several[TokenId], [3, [4]], "x[1]=[4]: must be a whole number"),
    (Several[TokenId], [0] * 2000, "must have a length of at most 1024, not 2000"),
    (Several[PAIR], [[1, 2], [3]], "x[1]=[3]: must have a length of at least 2, not 1"),
    (Several[PAIR], [[1, 2], [3, -4]], "x[1][1]=-4: must be at least 0"),
    (Share | Several[Share] | None, [0.5, 2], "x[1]=2: must be at most 1"),
    (Share | Several[Share] | None, -1, "x=-1: must be at least 0"),
    (tuple[Count, Count], (1,), "x[1]=(1,): is too short"),
    (Count, "a\nb\x1b[31m" * 50, "x='a\\nb\\x1b[31m"),
]


@pytest.mark.parametrize(("kind", "value", "words"), WORDS, ids=[words[:40] for _, _, words in WORDS])
def test_words(kind, value, words):
    with pytest.raises(GlimpseError) as error:
        one(kind, value, "x", "file.json")
    assert str(error.value).startswith("file.json: x") and words in str(error.value)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        (Count, np.int64(3), 3),
        (Count, np.array(3), 3),
        (Share, 1, 1.0),
        (Share, np.float32(0.5), 0.5),
        (Flag, np.bool_(True), True),
        (Several[TokenId], [1, np.int32(2)], (1, 2)),
        (Several[TokenId], np.array([1, 2]), (1, 2)),
        (Several[PAIR], [[1, 2], (3, 4)], ((1, 2), (3, 4))),
        (Share | None, None, None),
        (Share | Several[Share] | None, [0.5, 1], (0.5, 1.0)),
    ],
)
def test_values_become_pythons(kind, value, found):
    result = one(kind, value, "x")
    assert result == found and type(result) is type(found)
    assert not isinstance(result, tuple) or all(type(item) in (int, float, tuple) for item in result)


def test_an_object_whose_repr_fails():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    with pytest.raises(GlimpseError, match="x=<Odd.*>: must be a number"):
        one(Share, Odd(), "x")


def test_many_wrong_items_are_one_error():
    """The first is enough: an error per item would take many times the file's memory."""
    import tracemalloc

    items = [-1] * 1_000_000
    tracemalloc.start()
    with pytest.raises(GlimpseError, match=r"x\[0\]=-1: must be at least 0"):
        one(Several[Count], items, "x")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20  # a tuple of them takes 8
    tracemalloc.stop()


def test_checked_names_fields_as_their_file_does():
    @dataclass(frozen=True)
    class Pair:
        depth: Count
        ids: Several[Count] = ()

    assert checked(Pair(1, [2]), "file.json") == Pair(1, (2,))
    with pytest.raises(GlimpseError, match="^file.json: num_hidden_layers=-1: must be at least 0$"):
        checked(Pair(-1), "file.json", {"depth": "num_hidden_layers"})


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_inside_the_bounds(name):
    for config in (SIZES[name], SIZES[name].text, SIZES[name].vision):
        assert checked(config, name) == config


def test_known_activations_exist():
    assert set(get_args(Activation)) == set(layers.ACTIVATIONS)
