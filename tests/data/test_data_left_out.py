"""Records that cannot be trained on: found when they are measured, by name; one that cannot be read any more leaves its row empty."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import run_tools
import tiny_llava
from PIL import Image

from gp_jax import GlimpseError
from gp_jax.data.collate import Shape
from gp_jax.data.formats import LONGEST
from gp_jax.data.record import BadRecord, Entry, Record
from gp_jax.data.samples import SampleMaker
from gp_jax.data.schedule import Length
from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.pretrained.files import find_folder
from gp_jax.pretrained.hf_config import model_config, read_config
from gp_jax.processing.table import load_processor
from gp_jax.training import build
from gp_jax.training.settings import TrainConfig
from gp_jax.training.stages import describe

pytestmark = pytest.mark.quick

SIZE = (112, 84)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(SIZE, 40).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def record(name: str, question: str = "What?", answer: str = "red") -> Record:
    return Record(name, "d", question, answer, (picture(),), (((0.0, 0.0, 0.4, 0.4),),), (None,))


def entry(found: Record) -> Entry:
    return Entry(found.id, found.dataset, found.question, found.answer, (SIZE,))


@pytest.fixture(scope="module")
def makers(tmp_path_factory) -> dict[str, SampleMaker]:
    """One per kind of processor."""
    home = tmp_path_factory.mktemp("llava")
    model = tiny_llava.hf_model()
    folders = {"qwen": find_folder("scenes", ()), "llava": tiny_llava.save_hf(home / "hf", model)}
    folders["original"] = tiny_llava.save_original(home / "original", model)
    return {name: SampleMaker(load_processor(folder, model_config(read_config(folder))), 1) for name, folder in folders.items()}


OWN = {  # of whose texts a model's own tokens are made
    "qwen": ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>"),
    "llava": ("<image>", "<s>", "</s>"),
    "original": ("<image>", "<s>", "</s>"),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("where", ["question", "answer"])
def test_what_is_measured_can_be_made_and_the_rest_is_named(makers, kind, where):
    maker, texts = makers[kind], {text for texts in OWN.values() for text in texts}
    records = [record(f"{where} {text}", **{where: f"a {text}\n b"}) for text in sorted(texts)] + [record("plain")]
    found = dict(zip((r.id for r in records), maker.measure([entry(r) for r in records], "", strict=False), strict=True))
    own = {text for text in OWN[kind] if text in texts} - ({"<image>"} if (kind, where) == ("original", "answer") else set())
    known = set(maker.processor.tokenizer.get_vocab()) | {"<image>"}
    left_out = {name for name, length in found.items() if isinstance(length, str)}
    assert left_out == {f"{where} {text}" for text in own & known}, "another model's are plain text"
    assert all(f"its {where} holds the model's own token" in found[name] for name in left_out)
    for one in records:
        if one.id not in left_out:
            made = maker.make(one)
            assert found[one.id].answer == made.answer.size and found[one.id].shape.prompt == made.prompt.ids.size
    with pytest.raises(
        GlimpseError, match=rf"{len(left_out)} of {len(records)} records cannot be trained on: {re.escape(sorted(left_out)[0])} \("
    ):
        maker.measure([entry(r) for r in records], "")


def test_one_record_that_a_library_refuses_does_not_end_the_measuring(makers, monkeypatch):
    maker = makers["qwen"]
    records = [record("a"), record("b", "bad one"), record("c", "x" * (LONGEST + 1)), record("d")]
    plain = maker.measure([entry(records[0])], "")[0]
    chat = type(maker.processor).chat

    def strict(self, images: int, question: str, system: str | None = None) -> str:
        if "bad" in question:
            raise GlimpseError("the template fails")
        return chat(self, images, question, system)

    monkeypatch.setattr(type(maker.processor), "chat", strict)
    found = maker.measure([entry(r) for r in records], "", strict=False)
    assert found == [plain, "the template fails", f"it has more than {LONGEST} characters", plain]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    run_tools.prepare(folder)
    return folder


class Listed:
    """A source of records that are there, some of which cannot be read."""

    name = "listed"

    def __init__(self, records: list[Record], broken: tuple[int, ...] = ()):
        self.records, self.broken, self.entries = records, broken, [entry(r) for r in records]

    def __getitem__(self, number: int) -> Record:
        if number in self.broken:
            raise BadRecord(f"shard: record {number} is damaged")
        return self.records[number]


def feed(maker, source: Listed, monkeypatch, rows: tuple[int, ...] | None = None, **data):
    monkeypatch.setattr(build, "open_source", lambda _: source)
    monkeypatch.setattr(build, "local_rows", lambda mesh, batch: rows or tuple(range(batch)))
    config = TrainConfig(model="m", data=DataConfig(sources=(DataSource("listed"),), shapes=1, **data), batch_size=3, accumulation=1)
    return build.build_feed(config, config.data.sources, maker, None, lambda items, *_: items)


def test_a_run_says_which_records_it_leaves_out(makers, monkeypatch):
    maker = makers["qwen"]
    records = [
        record("good"),
        record("placeholder\x1b", "<|image_pad|>?"),
        record("long", answer="word " * 50),
        record("other", "<image>?"),
    ]
    found = feed(maker, Listed(records), monkeypatch, max_answer=20)
    assert found.schedule.samples == 2 and [len(members) for members in found.schedule.left_out.values()] == [1, 1]
    assert found.left_out() == (
        "1 because its question holds the model's own token <|image_pad|> (placeholder\\x1b); "
        "1 because its answer is longer than data.max_answer=20 tokens (long)"
    )
    run = build.Run(TrainConfig(), None, None, found, found, type("Step", (), {"params": {}}), 1, {})
    assert describe(run).count("left out of training: 1 because") == describe(run).count("left out of validation: 1 because") == 1
    with pytest.raises(GlimpseError, match=r"no record is left of listed \(train\): 1 are left out because its question holds"):
        feed(maker, Listed(records[1:2]), monkeypatch)


def test_a_record_that_cannot_be_read_leaves_its_row_empty(makers, monkeypatch, capsys):
    """The same for one host and for two; the others' rows are what they were."""
    maker, records = makers["qwen"], [record(str(i), f"What is {i}?") for i in range(6)]
    records[4] = dataclasses.replace(records[4], images=(b"bit rot",))
    records[5] = dataclasses.replace(records[5], boxes=(((float("nan"),) * 4,),))
    source = Listed(records, (1,))
    whole, low, high = (feed(maker, source, monkeypatch, rows) for rows in (None, (0, 1), (2,)))
    good = feed(maker, Listed([record(str(i), f"What is {i}?") for i in range(6)]), monkeypatch)
    empty = 0
    for number in range(2):
        a, b, c, wanted = (one.loader.map(number) for one in (whole, low, high, good))
        members = [r for _, r in whole.schedule[number].members]
        assert sorted(a.bad) == sorted(b.bad + c.bad) and len(a.bad) == sum(r in (1, 4, 5) for r in members)
        for name in ("reference", "number"):
            np.testing.assert_array_equal(getattr(a.batch, name), np.concatenate([getattr(b.batch, name), getattr(c.batch, name)]))
        for row, member in enumerate(members):
            if member in (1, 4, 5):
                empty += 1
                assert not a.batch.tail.valid[row].any() and (a.batch.tail.targets[row] < 0).all() and a.batch.number[row] == -1
                assert not a.batch.prompt.valid[row].any() and (a.batch.vision.token_image[row] < 0).all()
            else:
                np.testing.assert_array_equal(a.batch.tail.ids[row], wanted.batch.tail.ids[row])
                np.testing.assert_array_equal(a.batch.prompt.ids[row], wanted.batch.prompt.ids[row])
    assert empty == 3
    for _ in range(2):  # said once, however often it is read
        assert len(list(whole.load(0, 2))) == 2
    said = capsys.readouterr().err
    assert said.count("shard: record 1 is damaged; it is left out") == said.count("record 4: picture 1: is not an image") == 1
    assert said.count("record 5: ValueError") == 1 and len(whole.bad) == 3


def test_data_that_is_gone_is_an_error(makers, monkeypatch):
    """A disk that went away must not become a run that learns nothing."""
    source = Listed([record(str(i)) for i in range(15)], tuple(range(15)))
    with pytest.raises(GlimpseError, match="1[1-3] of 15 records cannot be read, most recently: shard: record"):
        list(feed(makers["qwen"], source, monkeypatch).load(0, 5))


def test_a_picture_larger_than_its_index_says_is_left_out(makers):
    from gp_jax.data.feed import LoadMicroBatch

    maker = makers["qwen"]
    found = record("large")
    shape = maker.measure([entry(found)], "")[0].shape
    loader = LoadMicroBatch([Listed([found])], maker, type("Plan", (), {"sources": [DataSource("x")]}), (0,), 1)
    assert loader.sample(0, 0, shape).answer.size
    with pytest.raises(BadRecord, match="record large: its pictures or texts are larger than the index of listed says"):
        loader.sample(0, 0, Shape(shape.slots, shape.prompt - 1, shape.tail))
    assert isinstance(maker.measure([entry(found)], "")[0], Length)
