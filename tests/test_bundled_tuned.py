"""The bundled model that was fine-tuned under pruning: the bundled model, an adapter and a glimpse."""

import jax
import numpy as np
import pytest

from gp_jax import GlimpseError, inference_params
from gp_jax.commands.merge import Merge, run
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.models.adapter import adapted, merge
from gp_jax.pretrained.checkpoint import Checkpoint
from gp_jax.pretrained.files import BUNDLED, BUNDLED_GLIMPSES, BUNDLED_TUNED
from gp_jax.training.plus.run import trained
from gp_jax.training.plus.settings import PlusConfig


@pytest.mark.quick
@pytest.mark.parametrize("name", BUNDLED_TUNED)
def test_a_bundled_tuned_model_is_a_base_an_adapter_and_a_glimpse(name, tmp_path):
    base, folder = BUNDLED_TUNED[name], BUNDLED_GLIMPSES[name]
    stored = Checkpoint.find(name)
    assert (stored.name, stored.folder) == (base, BUNDLED[base])
    model = stored.load()
    layers = {int(path.split(".")[2]) for path, _ in adapted(model)}
    assert model.glimpse_config == stored.glimpse is not None and min(layers) > stored.glimpse.reduce_layer, "the glimpse is the base's too"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6 and not (folder / "model.safetensors").exists()
    assert Checkpoint.find(name, glimpse=base).glimpse_source.where != stored.glimpse_source.where
    for adapter in (folder, name):
        with pytest.raises(GlimpseError, match=f"{name}: has an adapter of its own"):
            Checkpoint.find(name, adapter=adapter)
    by_parts = Checkpoint.find(base, glimpse=name, adapter=name)
    assert (by_parts.glimpse, by_parts.adapter.config) == (stored.glimpse, stored.adapter.config)
    with pytest.raises(GlimpseError, match=f"model={name} has an adapter already; merge it first"):
        trained(model, PlusConfig(model=name), None)
    files = EvalConfig(model=name).identity()["files"]
    assert {part.partition("/")[0] for part in files} == {"model", "glimpse", "adapter"}
    run(Merge(name, to=tmp_path / "merged", keep_glimpse=True))
    merged = Checkpoint.find(tmp_path / "merged")
    assert merged.adapter is None and merged.glimpse == stored.glimpse
    jax.tree.map(np.testing.assert_array_equal, inference_params(merge(model)), inference_params(merged.load()))
