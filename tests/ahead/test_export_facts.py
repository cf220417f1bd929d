"""`export.json`, and whatever else a request for an exported program is made from, is checked like any input."""

import json
import shutil

import pytest
from PIL import Image

from gp_jax import GlimpseError, Ladder, Ladders, Look, Prune, artifact_inputs
from gp_jax.ahead.artifact.facts import described, read_facts
from gp_jax.ahead.artifact.names import FACTS, PROCESSOR
from gp_jax.ahead.artifact.readme import describe_input
from gp_jax.pretrained.files import find_folder

pytestmark = pytest.mark.quick

BUCKETS = Ladders(Ladder("patches", (512,)), Ladder("prompt", (128, 256)), Ladder("kept", (64,)), batch=Ladder("batch", (1,)))
GOOD = described(
    Prune(), BUCKETS, glimpse=True, plan="glimpse", max_new_tokens=4, model="m", dtype="float32", attention="auto", gp_jax="1", jax="1"
)


@pytest.fixture
def folder(tmp_path):
    """An exported folder as far as requests need it, of the bundled model."""
    (tmp_path / PROCESSOR).mkdir()
    for path in find_folder("scenes", ()).iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, tmp_path / PROCESSOR / path.name)
    write(tmp_path, {})
    return tmp_path


def write(folder, changes: dict) -> None:
    facts = {name: value for name, value in (GOOD | changes).items() if value is not ...}
    (folder / FACTS).write_text(json.dumps(facts))


def request(folder) -> dict:
    return artifact_inputs(folder, Image.new("RGB", (96, 64), "red"), "Which?")


def test_what_is_written_is_read(folder):
    facts, rule, buckets = read_facts(folder)
    assert (facts.plan, rule, buckets) == ("glimpse", Prune(), BUCKETS)
    assert request(folder)["ids"].shape == (1, 256)
    write(folder, {"prune": None, "glimpse": False, "plan": ""})
    assert request(folder)["ids"].shape == (1, 256) and "cut0_fixed" not in request(folder)


def test_a_look_is_written_and_read(folder):
    look = Prune(look=Look(share=0.125, margin=2, sure=None))
    write(folder, {"prune": described(look, BUCKETS, glimpse=True, plan="look")["prune"], "plan": "look"})
    assert read_facts(folder)[1] == look and "look_ids" in request(folder)
    assert all(describe_input(name).startswith("(B,") and ": " in describe_input(name) for name in request(folder))
    picture = Image.new("RGB", (96, 64), "red")
    artifact_inputs(folder, picture, "Which?", prune=Prune(look=Look(share=0.125, threshold=0.3)))
    for other in (Prune(), Prune(look=Look(share=0.25)), Prune(look=Look(windows=[None]))):
        with pytest.raises(GlimpseError, match="exported for another look"):
            artifact_inputs(folder, picture, "Which?", prune=other)
    write(folder, prune(look={"share": 0.25, "more": 1}))
    with pytest.raises(GlimpseError, match="prune.look: more is not known"):
        read_facts(folder)


def buckets(**changes) -> dict:
    return {"buckets": {name: value for name, value in (GOOD["buckets"] | changes).items() if value is not ...}}


def prune(**changes) -> dict:
    return {"prune": GOOD["prune"] | changes}


BAD = (
    ({"buckets": 5}, "buckets"),
    ({"buckets": None}, "buckets"),
    ({"buckets": []}, "buckets"),
    ({"buckets": ...}, "buckets"),
    (buckets(batch=...), "buckets: batch is missing"),
    (buckets(batch=1), "buckets"),
    (buckets(batch=[]), "buckets"),
    (buckets(batch=["1"]), "buckets"),
    (buckets(batch=[True]), "buckets"),
    (buckets(prompt=[1.5]), "buckets"),
    (buckets(prompt=[256, 128]), "positive and ascending"),
    (buckets(prompt=[0]), "buckets"),
    (buckets(prompt=[2**40]), "buckets"),
    (buckets(batch=[1 << 20]), "patches of the whole batch of 1048576"),
    (buckets(patches=[16]), "'patches' ladder"),
    (buckets(rows=[1]), "rows is not known"),
    ({"prune": True}, "prune"),
    ({"prune": []}, "prune"),
    ({"prune": ...}, "prune"),
    (prune(more=1), "more is not known"),
    (prune(max_remain_ratio=2), "max_remain_ratio"),
    (prune(look=5), "prune.look"),
    (prune(look={"share": 2}), "share"),
    (prune(reduce_threshold=[]), "reduce_threshold"),
    (prune(anchor_positions=7), "anchor_positions"),
    (prune(method="magic"), "method"),
    (prune(reference_masks=5), "reference_masks"),
    (prune(method="fastv", fixed_remain_ratio=0.5, after=10**6), "after"),
    ({"glimpse": "yes"}, "glimpse"),
    ({"glimpse": False}, "prune"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"platforms": "cpu"}, "platforms"),
    ({"plan": None}, "plan"),
    ({"unknown": 1}, "unknown is not known"),
)


@pytest.mark.parametrize("changes, message", BAD, ids=[f"{changes}"[:60] for changes, _ in BAD])
def test_every_field_is_checked(folder, changes, message):
    write(folder, changes)
    with pytest.raises(GlimpseError, match=message) as error:
        request(folder)
    assert "\n" not in str(error.value) and (FACTS in str(error.value) or "ladder" in message)


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100000, "\ufeff{}", ""])
def test_damaged_files_are_one_line(folder, text):
    for name in (FACTS, f"{PROCESSOR}/config.json", f"{PROCESSOR}/generation_config.json"):
        good = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text(text)
        with pytest.raises(GlimpseError, match=name.split("/")[-1]):
            request(folder)
        if good is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(good)
    (folder / FACTS).unlink()
    with pytest.raises(GlimpseError, match="export.json: file is missing"):
        request(folder)
    with pytest.raises(GlimpseError, match="is not a path"):
        request("\0")
