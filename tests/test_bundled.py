"""The bundled model: it answers, prunes and generalises; transformers reads the same files and gives the same answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scenes_tools

from gp_jax import GlimpseVLM
from gp_jax.evaluation.results import read_predictions
from gp_jax.pretrained.checkpoint import Checkpoint
from gp_jax.pretrained.files import BUNDLED, BUNDLED_GLIMPSES
from gp_jax.processing.images import decode
from gp_jax.scenes.source import ScenesSource

RECORDS = 48
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def vlm():
    return GlimpseVLM.from_pretrained("scenes", ladders=scenes_tools.LADDERS)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Predictions by plan, on scenes far from those that figures are quoted for, and small ones: a third of the time."""
    out, plans = tmp_path_factory.mktemp("bundled") / "out", ("dense", "glimpse", "oracle", "nothing")
    options = {"model": "scenes", "tasks": "scenes:test:64-121", "start": 500_000, "limit": RECORDS, "batch": 16, "pictures": 1, "out": out}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "eval.py"), *words, "--plans", *plans]
    subprocess.run(command, check=True, capture_output=True, env=os.environ)
    predictions = read_predictions(out / "predictions.jsonl")
    return {name: [p for p in predictions if p.plan == name] for name in plans}


def exact(predictions):
    return float(np.mean([p.metrics["exact_match"] for p in predictions]))


def test_it_answers_and_the_benchmark_can_say_no(found):
    dense = exact(found["dense"])
    assert dense > 0.75
    assert exact(found["glimpse"]) > dense - 0.1 and exact(found["oracle"]) > dense - 0.08
    assert exact(found["nothing"]) < dense - 0.3


def test_it_prunes(found):
    own = found["glimpse"]
    assert len(own) == RECORDS and 1 - sum(p.kept for p in own) / sum(p.total for p in own) > 0.8
    assert np.mean([p.metrics["recall"] for p in found["glimpse"]]) > 0.7


@pytest.mark.quick
@pytest.mark.parametrize("name", BUNDLED_GLIMPSES)
def test_bundled_glimpses_fit_their_model(name):
    stored = Checkpoint.find("scenes", glimpse=name)
    assert stored.load().glimpse_config == stored.glimpse is not None and stored.folder == BUNDLED["scenes"]


def test_files_are_small_and_complete():
    folder = BUNDLED["scenes"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors", "glimpse.safetensors", "README.md"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 24e6
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] >= 8 and "reduce_layer" in config


def test_transformers_gives_the_same_answers(vlm):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = BUNDLED["scenes"]
    config = Qwen2_5_VLConfig.from_dict(json.loads((folder / "config.json").read_text()))
    oracle = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder), config=config, dtype=torch.float32).eval()
    source = ScenesSource("test", 4, start=600_000)
    for number in range(4):
        record = source[number]
        prepared = vlm.processor([[decode(record.images[0], record.id)]], [record.question])
        ids = torch.from_numpy(prepared.inputs["input_ids"])
        pixels = {name: torch.from_numpy(np.asarray(prepared.inputs[name])) for name in ("pixel_values", "image_grid_thw")}
        kinds = (ids == vlm.config.image_token_id).long()
        with torch.no_grad():
            done = oracle.generate(input_ids=ids, mm_token_type_ids=kinds, **pixels, max_new_tokens=16, do_sample=False)
        ours = vlm.generate(**prepared.inputs, prune=None, max_new_tokens=16)
        theirs = done[0, ids.shape[1] :].numpy()
        assert theirs.tolist() == ours.tokens[0][: theirs.size].tolist(), record.question


def test_the_command_line_knows_its_name(tmp_path):
    record = ScenesSource("test", 1, start=700_002)[0]  # family text
    picture = tmp_path / "scene.png"
    picture.write_bytes(record.images[0])
    command = [sys.executable, "-m", "gp_jax", "ask", str(picture), record.question, "--model", "scenes", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    facts = json.loads(done.stdout)
    assert facts["answer"] and 0 < facts["kept_tokens"] < facts["total_tokens"]
