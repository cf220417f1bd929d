"""LLaVA-NeXT in training and evaluation: what its two views per picture come to in samples, losses and reports."""

import io
import json

import jax
import numpy as np
import pytest
import tiny_llava as tiny
import train_tools as tools

from gp_jax import GlimpseVLM
from gp_jax.data.collate import Shape, lengths
from gp_jax.data.record import Entry, Record
from gp_jax.data.samples import SampleMaker

SIZES = ((90, 60), (50, 130))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny.save_hf(tmp_path_factory.mktemp("model"), tiny.hf_model(following=True))
    return GlimpseVLM.from_pretrained(folder, glimpse=tiny.save_glimpse(folder / "glimpse"), ladders=tiny.LADDERS)


def record(size: tuple[int, int], boxes: tuple) -> Record:
    file = io.BytesIO()
    tiny.photo(*size).save(file, "PNG")
    return Record("r:1", "d", "Who?", "red", (file.getvalue(),), (boxes,), (None,))


@pytest.fixture(scope="module")
def samples(vlm):
    """Both pictures with the evidence in their upper left quarter."""
    maker = SampleMaker(vlm.processor, vlm.model.glimpse_config.rows, 4096)
    return maker, [maker.make(record(size, ((0.0, 0.0, 0.45, 0.45),))) for size in SIZES]


def test_lengths_and_evidence_over_two_views(vlm, samples):
    maker, made = samples
    for size, sample in zip(SIZES, made, strict=True):
        said = maker.measure([Entry("r:1", "d", "Who?", "red", (size,))], "")[0]
        assert said.shape == lengths(sample.prompt.slots.size, sample.prompt.ids.size, sample.answer.size, maker.glimpse_rows)
        assert said.visual == sample.prompt.count == sample.reference.size
        overview, detail = vlm.processor.plot(*size).grids
        first, second = np.split(sample.reference, [overview[0] * overview[1]])
        for mask, (rows, columns) in ((first, overview), (second, detail)):
            mask = mask.reshape(rows, columns)
            assert (
                mask[: rows // 4 + 1, : columns // 4 + 1].all() and not mask[-(rows // 3) :].any() and not mask[:, -(columns // 3) :].any()
            )


def test_a_training_step_runs(vlm, samples):
    _, made = samples
    step, counts = tools.make_step(vlm.model), tools.counts(*made)
    batch = tools.batch(vlm, made, shape=Shape(slots=96, prompt=192, tail=16))
    state, gathered = step.start()
    gathered = step.accumulate(gathered, state, batch, counts)
    losses = {name: float(value) for name, value in gathered.sums.items()}
    assert all(np.isfinite(value) for value in losses.values()) and losses["dice"] > 0 and losses["language"] > 0
    before = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]  # the state is donated
    after = [np.array(leaf) for leaf in jax.tree.leaves(step.update(state, gathered)[0].params)]
    assert all(np.isfinite(leaf).all() for leaf in after) and any((a != b).any() for a, b in zip(after, before, strict=True))


def test_eval(vlm, tmp_path, capsys):
    from gp_jax.evaluation.command import main

    for number, size in enumerate(SIZES):
        tiny.photo(*size, seed=number).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "question": "Who?", "answer": "red", "boxes": [[0, 0, 20, 20]]} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = ["--model", str(vlm.folder), "--glimpse", str(vlm.folder / "glimpse"), "--out", str(tmp_path / "report")]
    tasks = ["--tasks", str(tmp_path / "rows.jsonl"), "--images", str(tmp_path), "--plans", "glimpse-11.1", "oracle", "--batch", "2"]
    assert main([*folders, *tasks, "--max-new-tokens", "2"]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()]
    totals = {sum(r * c for r, c in vlm.processor.plot(*size).grids) for size in SIZES}
    assert len(lines) == 4 and {line["total"] for line in lines} == totals


def test_released_boxes_through_the_sample_maker(tmp_path):
    """90 x 60 on a square of 90, 22.5 pixels a token."""
    folder = tmp_path / "original"
    folder.mkdir()
    processor = GlimpseVLM.from_pretrained(tiny.save_original(folder, tiny.hf_model()), ladders=tiny.LADDERS).processor
    made = record((90, 60), ((0.0, 0.2, 0.2, 0.3),))
    moved, released = (SampleMaker(processor, 1, released_boxes=flag).make(made).reference.reshape(4, 4) for flag in (False, True))
    assert released[[0, 1], 0].all() and released.sum() == 2, "y 18..27 of the square"
    assert moved[1, 0] and moved.sum() == 1, "y 27..33 pixels"
