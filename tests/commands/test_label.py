"""`gp-jax label`: questions about pictures become rows that `gp-jax prepare` takes, with three-state masks."""

import json

import numpy as np
import pytest
from PIL import Image

from gp_jax import GlimpseError, GlimpseVLM
from gp_jax.commands import label, prepare
from gp_jax.data.prepared import open_prepared
from gp_jax.data.samples import SampleMaker
from gp_jax.tiny import make_checkpoint, make_picture


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_checkpoint(folder / "model")
    (folder / "photos").mkdir()
    make_picture(folder / "photos" / "scene.png")
    return folder


def run(home, rows: list, *more: str) -> None:
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"images": home / "photos", "model": home / "model", "out": home / "photos" / "labels", "max-new-tokens": 3}
    label.run(label.parse([str(home / "rows.jsonl"), *(word for n, v in words.items() for word in (f"--{n}", str(v))), *more]))


def test_rows_and_masks_that_training_reads(home, capsys):
    rows = [{"image": "scene.png", "question": "What?"}, {"images": ["scene.png"], "question": "Which?", "answer": "red", "id": "b"}]
    vlm = GlimpseVLM.from_pretrained(home / "model")
    importance = vlm.glimpse([home / "photos" / "scene.png"], "What?")[0]
    low, high = (float(np.quantile(importance, q)) for q in (0.3, 0.8))
    run(home, rows, "--low", str(low), "--high", str(high))
    assert "2 rows" in capsys.readouterr().out
    made = [json.loads(line) for line in (home / "photos" / "labels" / "rows.jsonl").read_text().splitlines()]
    assert made[1]["answer"] == "red" and made[0]["answer"] and made[1]["id"] == "b" and made[0]["masks"] == ["labels/masks/000000-0.png"]
    assert Image.open(home / "photos" / made[0]["masks"][0]).size == Image.open(home / "photos" / "scene.png").size
    prepare.run(
        prepare.parse(
            [
                str(home / "photos" / "labels" / "rows.jsonl"),
                "--images",
                str(home / "photos"),
                "--out",
                str(home / "data"),
                "--workers",
                "1",
            ]
        )
    )
    source = open_prepared(str(home / "data"), "train")
    record = next(source[n] for n in range(2) if source[n].question == "What?")
    sample = SampleMaker(vlm.processor, 1).make(record)
    np.testing.assert_array_equal(sample.reference.reshape(importance.shape), importance > high)
    np.testing.assert_array_equal(~sample.known.reshape(importance.shape), (importance >= low) & (importance <= high))
    with pytest.raises(GlimpseError, match="holds rows.jsonl already"):
        run(home, rows)


def test_an_interrupted_command_goes_on(home, monkeypatch):
    """Behind the rows that it has labelled; with other settings it labels them again."""
    rows = [{"image": "scene.png", "question": question} for question in ("What?", "Which?", "Where?")]
    asked, mask = [], Image.fromarray(np.full((8, 8), 255, np.uint8))

    def labelled(vlm, pictures, question, args):
        if question == "Where?" and stop:
            raise KeyboardInterrupt
        asked.append(question)
        return "red", [mask]

    monkeypatch.setattr(label, "labelled", labelled)
    out, stop = home / "photos" / "later", True
    for more in ((), ("--high", "0.6")):
        with pytest.raises(KeyboardInterrupt):
            run(home, rows, "--out", str(out), *more)
        assert not (out / "rows.jsonl").exists()
    with (out / label.DONE).open("a") as file:
        file.write('{"key": "half')
    stop = False
    run(home, rows, "--out", str(out))
    assert asked == ["What?", "Which?", "What?", "Which?", "Where?"]
    assert len((out / "rows.jsonl").read_text().splitlines()) == 3 and sorted(p.name for p in out.iterdir()) == ["masks", "rows.jsonl"]


BAD = {
    r"rows.jsonl:1: has no question": ({"image": "scene.png"}, ()),
    r"rows.jsonl:1: image must be a path": ({"question": "What?"}, ()),
    r"rows.jsonl:1: ../x.png is outside": ({"image": "../x.png", "question": "What?"}, ()),
    r"must be a folder inside --images": ({"image": "scene.png", "question": "What?"}, ("--out", "elsewhere")),
    r"0 <= low <= high < 1": ({"image": "scene.png", "question": "What?"}, ("--low", "0.6")),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_labelled(home, tmp_path, message):
    row, more = BAD[message]
    with pytest.raises(GlimpseError, match=message):
        run(home, [row], "--out", str(home / "photos" / "others"), *more)
