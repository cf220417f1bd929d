"""What settings of the stage are refused, and how a step's questions are put together."""

import dataclasses

import numpy as np
import pytest

from gp_jax import GlimpseError
from gp_jax.data.collate import Shape
from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.models.adapter import AdapterConfig
from gp_jax.training.plus.questions import LoadedQuestions, together
from gp_jax.training.plus.run import doublings
from gp_jax.training.plus.settings import MasksConfig, PlusConfig, PolicyConfig, released, terms_of
from gp_jax.training.plus.step import without_idle
from gp_jax.training.plus.summary import means

pytestmark = pytest.mark.quick

GOOD = PlusConfig(model="somewhere", data=DataConfig(sources=(DataSource("data/own"),)))


def policy(**changes) -> dict:
    return {"policy": PolicyConfig(**changes)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ""}, "model is missing"),
        ({"stage": "grpo"}, "stage"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"data": DataConfig()}, r"data\.sources is empty"),
        ({"data": DataConfig(sources=(DataSource("x", rewards=("exact_mach",)),))}, r"data\.sources\[0\]\.rewards.*exact_mach"),
        ({"data": DataConfig(sources=(DataSource("x", rewards=("anls=much",)),))}, "anls=much"),
        ({"adapter": None}, "nothing to train"),
        ({"adapter": AdapterConfig(), "parameters": ("decoder.*",)}, "parameters"),
        ({"adapter": AdapterConfig(r=0)}, r"adapter\.r=0"),
        ({"adapter": AdapterConfig(lora_dropout=1.0)}, "lora_dropout"),
        ({"adapter": None, "parameters": ("decoder.*",)} | policy(beta=0.1), r"policy\.beta=0.1"),
        ({"masks": MasksConfig(kind="boxes")}, r"masks\.kind"),
        ({"masks": MasksConfig(predicted_share=2.0)}, r"masks\.predicted_share=2.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed"),
        (policy(loss="ppo"), r"policy\.loss"),
        (policy(mode="fast"), r"policy\.mode"),
        (policy(group_size=1), r"policy\.group_size=1"),
        (policy(group_size=2.5), r"policy\.group_size=2.5"),
        (policy(num_iterations=0), r"policy\.num_iterations=0"),
        (policy(temperature=0.0), r"policy\.temperature=0.0"),
        (policy(epsilon=float("nan")), r"policy\.epsilon=nan"),
        (policy(top_p=0.0), r"policy\.top_p=0.0"),
        (policy(flat_groups="maybe"), r"policy\.flat_groups"),
    ],
)
def test_refused(changes, said):
    with pytest.raises(GlimpseError, match=said):
        dataclasses.replace(GOOD, **changes).check()


def test_presets_and_own_data():
    found = released(GOOD).check()
    assert (found.policy.mode, found.policy.group_size, found.policy.beta, found.adapter.lora_dropout) == ("released", 4, 0.04, 0.05)
    own = dataclasses.replace(GOOD, data=DataConfig(own="mine", sources=(DataSource("x", suffix="Briefly.", rewards=("anls",)),))).check()
    assert own.data.sources == (DataSource("mine", suffix="Briefly.", rewards=("anls",)),)
    assert [(term.name, term.weight) for term in terms_of(("anls", "judge=0.5"))] == [("anls", 1.0), ("judge", 0.5)]
    assert doublings(1) == [1] and doublings(6) == [1, 2, 4, 6] and doublings(8) == [1, 2, 4, 8]


def test_questions_of_one_bucket_are_answered_together():
    short, long = Shape(16, 32, 8), Shape(64, 96, 8)
    member = (0, "record", "sample")
    loaded = [LoadedQuestions(0, short, (member, member)), LoadedQuestions(1, long, (member,)), LoadedQuestions(2, short, (member,))]
    groups = together(loaded, first=10)
    assert [[question.number for question in own.questions] for own in groups] == [[10, 11, 13], [12]]
    assert [own.parts for own in groups] == [[[0, 1], [2]], [[0]]]
    assert together([LoadedQuestions(0, short, (), ("bad",))]) == []
    assert without_idle([[0, 1], [2, 3], [4]], np.array([True, False, True, True, True]), 2) == [[0, 2], [3, 4]]


def test_log_lines_have_means_of_what_was_drawn():
    found = means(
        {
            "kl": 0.5,
            "sum:reward": 3.0,
            "squares:reward": 5.0,
            "count:reward": 2.0,
            "sum:reward/a": 0.0,
            "squares:reward/a": 0.0,
            "count:reward/a": 0.0,
        }
    )
    assert found["kl"] == 0.5 and found["reward"] == 1.5 and found["reward_std"] == 0.5 and found.keys() == {"kl", "reward", "reward_std"}
