"""Families of models: every record is complete, and one record is all that a new family needs besides its own files."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import tiny_models as tiny

from gp_jax import GlimpseError, GlimpseVLM, Prune
from gp_jax.config import families
from gp_jax.config.families import FAMILIES, Family, Lazy, family_of
from gp_jax.config.vision import VisionConfig
from gp_jax.flops import windowed_tower
from gp_jax.models.vision import VisionTower
from gp_jax.pretrained import qwen
from gp_jax.pretrained.names import Names
from gp_jax.processing.views import read_grids

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_every_address_of_a_record_leads_somewhere(family):
    parts = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
    loaded = {name: part.load() for name, part in parts.items() if isinstance(part, Lazy)}
    assert isinstance(loaded.pop("names"), Names) and all(map(callable, loaded.values())), loaded
    arguments = {name: list(inspect.signature(part).parameters) for name, part in loaded.items()}
    assert arguments["processor"] == ["folder", "config"]
    assert list(inspect.signature(loaded["tower"].__init__).parameters) == ["self", "config", "dtype", "rngs"]
    assert arguments["pictures"] == list(inspect.signature(read_grids).parameters)
    assert arguments["cost"] == list(inspect.signature(windowed_tower).parameters)


def test_no_two_families_share_a_model_type():
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names)) and all(name in family_of(name).model_types for name in names)
    with pytest.raises(GlimpseError, match="model_type='gpt2' is not one of qwen2_5_vl, qwen3_vl, llava_llama, llava, llava_next"):
        family_of("gpt2")


@dataclasses.dataclass(frozen=True)
class OwnVision(VisionConfig):
    """A tower configuration of a class that the package does not know."""


class OwnTower(VisionTower):
    """Its tower."""


def read_own(hf, generation, where):
    config = qwen.read_model(hf, generation, where)
    return dataclasses.replace(config, model_type="own", vision=OwnVision(**vars(config.vision)))


def test_one_record_adds_a_family(tmp_path, monkeypatch):
    tiny.hf_model().save_pretrained(tmp_path / "known")
    known = GlimpseVLM.from_pretrained(tmp_path / "known", ladders=tiny.LADDERS)
    path, here = tmp_path / "known" / "config.json", __name__
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own_file"}))
    with pytest.raises(GlimpseError, match="model_type 'own_file' is not supported"):
        GlimpseVLM.from_pretrained(tmp_path / "known")
    record = dict(title="Own", model_types=("own",), file_types=("own_file",), key="own", read=Lazy(f"{here}:read_own"))
    own = dataclasses.replace(family_of("qwen2_5_vl"), **record, tower=Lazy(f"{here}:OwnTower"))
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, own))
    vlm, inputs = GlimpseVLM.from_pretrained(tmp_path / "known", ladders=tiny.LADDERS), tiny.inputs([[3, (3, 5), 2]])
    assert isinstance(own, Family) and isinstance(vlm.model.vision, OwnTower) and vlm.config.family is own
    prune = Prune(method="visionzip", fixed_remain_ratio=0.5)
    ours, theirs = (model.generate(**inputs, prune=prune, max_new_tokens=2) for model in (vlm, known))
    np.testing.assert_array_equal(ours.first_logits, theirs.first_logits)
