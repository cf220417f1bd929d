"""Generation compiled for TPUs that are not here: with the TPU compiler where it is installed, and with fake devices in their place."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest

from gp_jax import GlimpseError, Ladder, Ladders
from gp_jax.ahead import compiling, hlo, report
from gp_jax.ahead.compiling import placed
from gp_jax.ahead.generation import compile_generation, explained
from gp_jax.ahead.passes import Request
from gp_jax.ahead.topology import choose_sizes, generation_of, inference_mesh, parse_mesh, topology_devices
from gp_jax.commands import compile as command
from gp_jax.pretrained.hf_config import glimpse_config, model_config
from gp_jax.pretrained.known import SIZES
from gp_jax.pretrained.params import abstract_model
from gp_jax.sharding import make_mesh, replicated
from gp_jax.tiny import CONFIG
from gp_jax.training.build import glimpse_config as chosen_glimpse
from gp_jax.training.settings import GlimpseSettings

LADDERS = Ladders(
    Ladder("patches", (1024,)), Ladder("prompt", (256,)), Ladder("kept", (64, 128)), Ladder("decode", (32,)), Ladder("batch", (1, 2, 4, 8))
)
GIB = 2**30
libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")


@pytest.fixture(scope="module")
def compiled():
    """On eight fake devices, for the backend that is here."""
    config = model_config(CONFIG, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "targeting", lambda backend: contextlib.nullcontext())
        names = []

        def watch(name):
            names.append(name)
            return contextlib.nullcontext()

        request = Request(4, 150, 20, 8, retention=0.2)
        options = dict(dtype="float32", ladders=LADDERS, mesh=make_mesh(2, 2, 2), watch=watch)
        found = compile_generation(config, glimpse_config(CONFIG, config), "v5e:2x4", request, **options)
    assert sorted(names) == sorted(p.name for p in found.programs) and len({*names}) == len(names), "each program once"
    return found, request


def test_the_programs_are_those_of_the_engine(compiled):
    found, _ = compiled
    pruned, dense = found.plans["glimpse"].runs, found.plans["dense"].runs
    assert pruned["vision block in windows"] == dense["vision block in windows"] == 2 and pruned["vision block whole"] == 2
    assert pruned["layer, 256 rows"] == pruned["glimpse rows"] == 4 and pruned["glimpse attention"] == 1 and pruned["layer, 64 rows"] == 2
    assert dense["layer, 256 rows"] == 6 and "score" not in dense and "compact to 64 rows" not in dense
    assert pruned["decode, cache of 64 rows"] == dense["decode, cache of 256 rows"] == 1
    assert found.lengths == {"batch": 4, "patches": 1024, "prompt": 256, "kept": 64, "decode": 32}


def test_two_looks(monkeypatch):
    """Two passes through the engine: the first ends with its scores, the second has fewer patches and rows; nothing else is compiled."""
    config = model_config(CONFIG, {})
    monkeypatch.setattr(compiling, "targeting", lambda backend: contextlib.nullcontext())
    ladders = dataclasses.replace(LADDERS, patches=Ladder("patches", (256, 512, 1024)), prompt=Ladder("prompt", (96, 128, 256)))
    request = Request(4, 150, 20, 8, retention=0.2, look_share=0.25, seen=0.3)
    options = dict(dtype="float32", ladders=ladders, mesh=make_mesh(2, 2, 2), plans=("look", "dense"))
    found = compile_generation(config, glimpse_config(CONFIG, config), "v5e:2x4", request, **options)
    look, dense = found.plans["look"], found.plans["dense"]
    assert sum(runs for name, runs in look.runs.items() if name.startswith("layer, ")) == 4 + 6
    assert sum(runs for name, runs in look.runs.items() if name.startswith("vision block")) == 2 * 4
    assert look.runs["advance" if "advance" in look.runs else next(n for n in look.runs if n.startswith("decode"))] == 1
    assert found.lengths["patches of the first look"] < found.lengths["patches"] == 1024
    words = (found, request, "tiny", "v5e:2x4", "float32")
    assert "vision and prefill, of dense" in report.text(*words) and "look: first at 25.0%" in report.text(*words)
    read = report.ratios(found)["vision and prefill"]
    assert 0.2 < read["flops_sizes"] < 1 and abs(read["flops_xla"] / read["flops_sizes"] - 1) < 0.2 and look.cache < dense.cache


def test_memory_holds_weights_and_what_lives_between_programs(compiled):
    found, _ = compiled
    layer = found.program("layer, 256 rows")
    assert found.weights < layer.resident and layer.arguments + layer.temporary < layer.resident
    assert found.needed == max(p.resident for p in found.programs) and found.fits
    text = model_config(CONFIG, {}).text
    row = 2 * text.num_key_value_heads // 2 * text.head_dim * 4 * text.num_hidden_layers  # float32, two of the mesh's devices share heads
    assert found.plans["dense"].cache == row * (256 + 32) and found.plans["glimpse"].cache == row * (64 + 32)


def test_every_program_has_its_own_name(monkeypatch):
    """Two of one label are two lines and two counts."""
    monkeypatch.setattr(compiling, "targeting", lambda backend: contextlib.nullcontext())
    compiler = compiling.Compiler(make_mesh(2, 2, 2), 0, lambda *_: "doubled", lambda name: contextlib.nullcontext(), frozenset())
    compiler.begin()

    def doubled(_, x):
        return 2 * x

    for dtype in ("float32", "int32", "float32"):
        compiler(doubled, None, compiling.Value((8, 4), dtype, replicated(compiler.mesh), compiler.memory))
    assert [p.name for p in compiler.own.ran] == ["doubled", "doubled (2)", "doubled"]


def test_the_vision_tower_of_another_family_is_vision():
    whole = SIZES["llava-1.5-7b"]
    vision = dataclasses.replace(
        whole.vision, hidden_size=32, num_heads=4, depth=2, intermediate_size=64, image_size=112, out_hidden_size=64, select_layer=1
    )
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    config = dataclasses.replace(whole, vision=vision, text=dataclasses.replace(whole.text, vocab_size=128, **text))
    ladders = dataclasses.replace(LADDERS, patches=Ladder("patches", (64,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "targeting", lambda backend: contextlib.nullcontext())
        options = dict(plans=("dense",), dtype="float32", ladders=ladders, mesh=make_mesh(2, 2, 2))
        glimpse = chosen_glimpse(GlimpseSettings(), config)
        found = compile_generation(config, glimpse, "v5e:2x4", Request(4, 64, 20, 8), **options)
    stages = {p.name: p.stage for p in found.programs}
    assert {name for name, stage in stages.items() if stage == "vision"} == {
        "clip tower embed",
        "clip block run",
        "patches only",
        "two layers",
    }
    assert stages["layer, 256 rows"] == stages["head behind 256 rows"] == "decoder prefill"
    table = report.totals(found, "dense")
    assert 0 < table["vision"]["flops_sizes"] < table["vision"]["flops_xla"], "XLA counts more than products"


def test_reports(compiled):
    found, request = compiled
    words = (found, request, "tiny", "v5e:2x4", "float32")
    text = report.text(*words)
    for part in ("layer, 256 rows", "needs ", "GiB of 15.75 GiB per chip", ": fits", "decode token", "padded to batch 4"):
        assert part in text
    facts = json.loads(json.dumps(report.facts(*words)))
    ratios = facts["pruned over dense"]
    assert ratios["decode token"]["flops_xla"] < 0.9 and ratios["kv cache"]["bytes"] == pytest.approx(96 / 288)
    assert ratios["decoder prefill"]["flops_sizes"] == pytest.approx(ratios["decoder prefill"]["flops_xla"], rel=0.2)
    assert sum(facts["programs"][0]["facts"]["collectives"].values()) >= 0
    assert next(p for p in facts["programs"] if p["name"] == "layer, 256 rows")["facts"]["collectives"]["all-reduce"] > 0


def test_all_shapes_are_let_go(compiled):
    memory = compiling.Memory()
    value = compiling.Value((8, 4), "float32", jax.sharding.SingleDeviceSharding(jax.devices()[0]), memory)
    assert memory.held == 128 and compiling.plain(value).shape == (8, 4)
    del value
    assert memory.held == 0


PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[64,128]) -> f32[64,64] {
  %inside = f32[900,900]{1,0} broadcast(%p), dimensions={}
}

%body (s: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %x = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} fusion(%s), kind=kLoop, calls=%fused
  %reduced = bf16[4,128]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (p: bf16[4,64]) -> f32[512,512] {
  %gathered = (bf16[4,64]{1,0}, bf16[4,128]{1,0}) all-gather-start(%p0), dimensions={1}
  %p0 = bf16[4,64]{1,0} parameter(0)
  %loop = (s32[], bf16[4,128]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %splash_mqa.1 = (f32[4]{0}, bf16[4,512,128]{2,1,0:T(8,128)(2,1)}) custom-call(%q, %k), custom_call_target="tpu_custom_call"
  ROOT %scores = f32[512,512]{1,0} fusion(%k), kind=kLoop, calls=%fused
}
"""


def test_what_a_program_says_of_itself():
    facts = hlo.read(PROGRAM, {512: 0})
    assert facts.collectives == {"all-reduce": 5 * 4 * 128 * 2, "all-gather": 4 * 64 * 2}, "a loop's as often as it runs"
    assert facts.splash == facts.kernels == 1 and facts.loops == (5,)
    assert facts.largest == facts.squares == 512 * 512 * 4, "what a fusion computes on the way is not stored"
    assert hlo.read(PROGRAM, {4096: 0}).squares == 0
    assert hlo.read(PROGRAM, {512: 512 * 512}).squares == 0, "rows of so many values are no scores"
    assert hlo.type_bytes("(pred[3], s4[4], f8e4m3fn[2], u32[])") == 3 + 2 + 2 + 4


@pytest.mark.parametrize(
    "model, chips, batch, hbm, sizes",
    [
        ("7b", 8, 8, 15.75, (2, 1, 4)),  # as wide as there are key-value heads
        ("3b", 1, 1, 15.75, (1, 1, 1)),
        ("3b", 8, 8, 15.75, (4, 1, 2)),
        ("3b", 8, 1, 15.75, (1, 1, 8)),  # one sample cannot be split: heads are
        ("7b", 8, 3, 15.75, (2, 1, 4)),  # nothing divides
        ("72b", 16, 8, 95.74, (2, 1, 8)),
        ("72b", 16, 8, 15.75, (1, 1, 16)),  # wider, for the weights
        ("72b", 4, 8, 31.25, (1, 1, 4)),  # too large in any case; the report says so
    ],
)
def test_the_mesh_that_is_chosen(model, chips, batch, hbm, sizes):
    weights = {"3b": 7.5e9, "7b": 16.6e9, "72b": 146.8e9}[model]
    assert choose_sizes(SIZES[model].text, chips, batch, int(weights), int(hbm * GIB)) == sizes


def test_topology_and_mesh_errors_name_what_is_known():
    for topology in ("v9:2x2", "v5e", "v5e:0x2", "v5e:2x2x2x2", ":"):
        with pytest.raises(GlimpseError, match=r"--topology .*v5e: 1x1 2x2 2x4 .*v5p: 2x2x1"):
            generation_of(topology)
    assert parse_mesh("data=2, tensor=4") == {"data": 2, "tensor": 4}
    for mesh in ("data", "data=x", "heads=2", "data=2,data=2", "data=0"):
        with pytest.raises(GlimpseError, match="--mesh .* is not like data=2,fsdp=1,tensor=4"):
            parse_mesh(mesh)


def test_what_does_not_fit_is_one_line():
    error = RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. Used 21.50G of 15.75G hbm. Exceeded ...")
    assert str(compiling.shortage(error)) == "needs 21.50 GiB of 15.75 GiB per chip"
    error = RuntimeError("RESOURCE_EXHAUSTED: ... required for HLO temporaries (512.00G) exceeds available HBM (30.75G).")
    assert str(compiling.shortage(error)) == "needs 512.00 GiB of 30.75 GiB per chip"
    assert "does not fit: RESOURCE_EXHAUSTED" in str(compiling.shortage(RuntimeError("RESOURCE_EXHAUSTED: another way")))
    kernel = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 18.00M of 16.00M vmem. Exceeded vmem capacity by 2.00M."
    assert str(compiling.shortage(RuntimeError(kernel))) == f"does not fit: {kernel}", "a kernel's memory is not the chip's"
    assert compiling.shortage(RuntimeError("INTERNAL")) is None


def command_line(*options: object, **more: object) -> subprocess.CompletedProcess:
    """`gp-jax compile` as a user runs it."""
    drop = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {k: v for k, v in os.environ.items() if k not in drop} | {k: str(v) for k, v in more.items()}
    argv = [sys.executable, "-m", "gp_jax", "compile", *map(str, options)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)


def test_activations_as_wide_as_a_sequence_is_long_are_no_scores():
    config = model_config(CONFIG, {})
    abstract, width = abstract_model(config, glimpse_config(CONFIG, config), "float32"), config.text.hidden_size
    for sizes, batch, most in (((2, 2, 2), 8, 2), ((4, 2, 1), 4, 4), ((2, 2, 2), 2, 2)):  # 4 samples over 8 devices: each has all
        mesh = make_mesh(*sizes)
        assert explained({width, 997}, placed(abstract, mesh), batch, mesh) == {width: most * width**2, 997: 0}
    heads = config.text.num_attention_heads  # one on each chip: its scores are as many
    mesh = make_mesh(1, 1, heads, devices=jax.devices()[:heads])
    assert explained({width}, placed(abstract, mesh), 1, mesh) == {width: 0}


@libtpu
def test_topologies(monkeypatch):
    for name, value in command.WITHOUT_TPU.items():
        monkeypatch.setenv(name, value)
    for topology, chips in (("v5e:1x1", 1), ("V5E:2x4", 8), ("v6e:4x4", 16), ("v5p:2x2x4", 16), ("v4:2x2x2", 8)):
        assert len(topology_devices(topology)) == chips
    with pytest.raises(GlimpseError, match=r"v5e:3x5.*known: v4"):
        topology_devices("v5e:3x5")
    mesh = inference_mesh("v5e:2x4", {"tensor": 2}, SIZES["3b"].text, 1, 0)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    for topology in ("v6e:4x4", "v5p:2x2x4", "v4:4x4x1", "v5e:4x4"):  # tensor=8 of 4 x 4: two rows, part of a side
        mesh = inference_mesh(topology, {}, SIZES["72b"].text, 8, 146_800_000_000)
        assert mesh.shape["tensor"] >= 8 and len({*mesh.devices.flat}) == 16
    with pytest.raises(GlimpseError, match="does not divide 8 devices"):
        inference_mesh("v5e:2x4", {"tensor": 3}, SIZES["3b"].text, 1, 0)


@libtpu
def test_weights_that_do_not_fit_are_exit_status_1(tmp_path):
    words, width = 2**20, 4096  # of few layers: quicker to describe than a large model
    wide = {"hidden_size": width, "num_attention_heads": width // 16, "vocab_size": words}
    tower = CONFIG["vision_config"] | {"out_hidden_size": width}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | wide | {"vision_config": tower}))
    done = command_line("--model", tmp_path, "--dtype", "float32", "--topology", "v5e:1x1", "--visual-tokens", "600")
    assert done.returncode == 1
    need = re.search(r"^gp-jax: v5e:1x1: the weights alone need (\d+\.\d\d) GiB of 15\.75 GiB per chip$", done.stderr, re.MULTILINE)
    tables = 1 if CONFIG.get("tie_word_embeddings") else 2
    assert need and float(need[1]) == pytest.approx(tables * words * width * 4 / GIB, rel=0.05), done.stderr


@libtpu
def test_the_tpu_compiler_takes_every_program(tmp_path):
    """A small configuration through the command; it attends with splash attention and stores no rows x rows."""
    vision = CONFIG["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}
    small = CONFIG | {"num_hidden_layers": 2, "vision_config": vision, "selected_layers": [0], "reduce_layer": 0, "le_layers": [0, 1]}
    (tmp_path / "config.json").write_text(json.dumps(small | {"selected_visual_layers": [1]}))
    options = ["--model", tmp_path, "--topology", "v5e:2x2", "--batch", "2", "--visual-tokens", "600", "--json", tmp_path / "report.json"]
    done = command_line(*options, "--tensor", "4", XDG_CACHE_HOME=tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "cache" / "gp_jax").exists(), "nothing could read these programs back"
    assert "note: 2 key-value heads do not divide over tensor=4: they are replicated\n" in done.stderr and "Warning" not in done.stderr
    assert ": fits" in done.stdout and "no array of rows x rows" in done.stdout and "compiled score in" in done.stderr
    programs = {p["name"]: p for p in json.loads((tmp_path / "report.json").read_text())["programs"]}
    rows = Ladders().prompt.fit(600 + 64 + 1)  # visual, text and glimpse rows
    assert programs[f"layer, {rows} rows"]["facts"]["splash"] == 1
    assert programs["vision block whole"]["facts"]["splash"] == 1 and programs["predictor block"]["facts"]["splash"] == 1
