"""What a server would run on TPUs that are not here, with fake devices in their place."""

import contextlib
import json

import jax
import pytest

from gp_jax import GlimpseError, Ladder, Ladders
from gp_jax.ahead import compiling
from gp_jax.ahead.serving import compile_serving, facts, report, verdict
from gp_jax.commands import compile as command
from gp_jax.pretrained.hf_config import glimpse_config, model_config
from gp_jax.serving.lengths import Lengths
from gp_jax.serving.settings import ServerSettings
from gp_jax.sharding import make_mesh
from gp_jax.tiny import CONFIG

GIB = 2**30
CAPACITIES, SLOTS = (64, 256), 8
LADDERS = Ladders(
    Ladder("patches", (256,)), Ladder("prompt", (256,)), Ladder("kept", CAPACITIES), Ladder("decode", (SLOTS,)), Ladder("batch", (1,))
)


@pytest.fixture(scope="module")
def compiled():
    config = model_config(CONFIG, {})
    settings = ServerSettings("tiny", dtype="float32", max_prompt=200, max_new_tokens=SLOTS, kv_memory="1G", vision_cache="1G")
    row = 2 * config.text.num_hidden_layers * config.text.num_key_value_heads * config.text.head_dim * 4
    place = tuple(row * (capacity + SLOTS) for capacity in CAPACITIES)
    lengths = Lengths(LADDERS, CAPACITIES, ((1, 4), (1, 2)), place, SLOTS, GIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "targeting", lambda backend: contextlib.nullcontext())
        found = compile_serving(
            config, glimpse_config(CONFIG, config), "v5e:1x2", settings, lengths=lengths, mesh=make_mesh(1, 1, 2, devices=jax.devices()[:2])
        )
    return found, settings, place


def test_every_pool_s_programs_are_compiled_at_its_largest_size(compiled):
    found, _, place = compiled
    assert [(pool.capacity, pool.places) for pool in found.pools] == [(64, 4), (256, 2)]
    assert [2 * pool.place for pool in found.pools] == list(place), "two chips share the heads"
    names = {program.name for program in found.programs}
    for part in (
        "layer, 256 rows",
        "layer, 64 rows",
        "place a prompt, cache of 64 rows",
        "decode, cache of 256 rows",
        "compact to 64 rows",
    ):
        assert part in names
    assert found.pools[0].runs[-1] == "decode, cache of 64 rows"


def test_memory_holds_all_caches_whatever_runs(compiled):
    found, settings, _ = compiled
    assert found.caches == GIB // 2 and found.vision_cache == GIB
    rest = [program for program in found.programs if not program.name.startswith(("blank", "empty cache"))]
    assert all(program.resident > found.weights + found.vision_cache for program in rest)
    assert found.needed > found.weights + found.caches + found.vision_cache and found.fits
    assert found.room == found.caches + found.hbm - found.needed
    words = (found, settings, "v5e:1x2")
    for part in ("64 rows", "of 15.75 GiB per chip", ": fits", "caches could take", "decode needs GiB"):
        assert part in report(*words)
    assert json.loads(json.dumps(facts(*words)))["pools"][1]["capacity"] == 256 and ": fits" in verdict(found)


def test_settings_are_those_of_the_server():
    with pytest.raises(GlimpseError, match="--kv-memory lots"):
        command.serve(command.Compile(model="3b", kv_memory="lots"), model_config(CONFIG, {}), None, {})
