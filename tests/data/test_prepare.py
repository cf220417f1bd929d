"""Preparing: the same bytes however it ran, reports, limits, and folders that TFDS and we can read."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gp_jax import cli
from gp_jax.commands import prepare as prepare_command
from gp_jax.data import prepare as preparing
from gp_jax.data import work
from gp_jax.data.builder import decode, encode
from gp_jax.data.prepare import TooManyBad, prepare
from gp_jax.data.prepared import open_prepared
from gp_jax.data.record import Record
from gp_jax.errors import GlimpseError
from gp_jax.runtime.lock import only_one

ROWS = 23


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        Image.effect_noise((64 + i, 48), 40).convert("RGB").save(folder / f"{i}.jpg")
    Image.new("L", (64, 48), 255).save(folder / "mask.png")
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:500])
    return folder


def row(i: int) -> dict:
    """Good ones in two splits, one with two pictures, one with a mask; the sixth is bad."""
    fields = {"image": f"{i % 6}.jpg", "question": f"What is {i}?", "answer": f"é {i}", "boxes": [[1, 2, 30 + i, 40]], "id": str(i)}
    fields |= {"split": "val"} if i % 4 == 3 else {}
    if i == 5:
        fields["image"] = "broken.jpg"
    if i == 8:
        fields |= {"image": ["0.jpg", "1.jpg"], "boxes": [[], [1, 2, 30, 40]]}
    if i == 10:
        fields |= {"image": "0.jpg", "boxes": None, "mask": "mask.png"}
    return fields


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "own.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(ROWS)))
    return path


def run(source: Path, images: Path, out: Path, **options):
    return prepare([source], images, out, **{"workers": 1, "rows_per_shard": 4, "progress": False} | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(source, images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "data"
    run(source, images, out)
    return out


def same_data(a: Path, b: Path) -> bool:
    """Equal but for where TFDS says it lies."""
    left, right = contents(a), contents(b)
    assert set(left) == set(right)
    return all(left[name] == right[name] for name in left)


class TestResult:
    def test_records(self, prepared, images):
        train, val = open_prepared(prepared), open_prepared(prepared, "val")
        numbers = [i for i in range(ROWS) if i != 5]
        assert [entry.id for entry in train.entries] == [str(i) for i in numbers if i % 4 != 3]
        assert [entry.id for entry in val.entries] == [str(i) for i in numbers if i % 4 == 3]
        record = train[4]
        assert (record.question, record.answer, record.dataset) == ("What is 6?", "é 6", "own")
        assert record.images == ((images / "0.jpg").read_bytes(),) and train.entries[4].sizes == ((64, 48),)
        np.testing.assert_allclose(record.boxes, [[[1 / 64, 2 / 48, 36 / 64, 40 / 48]]], rtol=1e-6)
        two, masked = (next(r for r in map(train.__getitem__, range(len(train))) if r.id == name) for name in ("8", "10"))
        assert [len(boxes) for boxes in two.boxes] == [0, 1] and len(two.images) == 2 and two.masks == (None, None)
        assert masked.masks == ((images / "mask.png").read_bytes(),) and masked.boxes == ((),)

    def test_what_the_evidence_is_made_from_has_a_digest(self, prepared, source, images, tmp_path):
        """Moved boxes are in no entry."""
        import shutil

        (moved := tmp_path / source.name).write_text(source.read_text(encoding="utf-8").replace("36", "37"), encoding="utf-8")
        run(moved, images, tmp_path / "moved")
        shutil.copytree(prepared, tmp_path / "copied")
        whole, other, copied = map(open_prepared, (prepared, tmp_path / "moved", tmp_path / "copied"))
        assert whole.entries == other.entries and whole.made_from != other.made_from
        assert whole.made_from == copied.made_from != open_prepared(prepared, "val").made_from
        (tmp_path / "copied" / "prepare.json").write_text("{")
        with pytest.raises(GlimpseError, match=r"prepare\.json: is not valid JSON"):
            _ = open_prepared(tmp_path / "copied").made_from

    def test_entries_are_those_of_the_records(self, prepared, tmp_path):
        """With the index and, for a plain TFDS folder, without."""
        plain = tmp_path / "plain"
        plain.mkdir()
        for name, data in contents(prepared).items():
            if not name.startswith("index"):
                (plain / name).write_bytes(data)
        for split in ("train", "val"):
            source = open_prepared(prepared, split)
            assert source.entries == open_prepared(plain, split, progress=False).entries
            assert [(e.id, e.question, e.answer) for e in source.entries] == [
                (r.id, r.question, r.answer) for r in (source[i] for i in range(len(source)))
            ]

    def test_sources_travel_between_processes(self, prepared):
        source = open_prepared(prepared)
        source[0], source.entries
        sent = pickle.dumps(source)
        assert len(sent) < 1000 and pickle.loads(sent)[3] == source[3] and source[-1] == source[len(source) - 1]
        with pytest.raises(IndexError):
            source[len(source)]

    def test_tfds_reads_it_without_tensorflow(self, prepared):
        code = f"""
import sys, tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(prepared)!r})
source = builder.as_data_source("train")
example = source[1]
assert builder.info.splits["val"].num_examples == 5, builder.info
assert example["question"] == b"What is 1?" and example["images"][0][:2] == b"\\xff\\xd8" and len(example["boxes"]["box"]) == 1
from gp_jax.data.prepared import open_prepared
assert open_prepared({str(prepared)!r})[1].question == "What is 1?"
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
print(len(source))
"""
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.stdout.split() == ["17"], out.stderr

    def test_nothing_is_left_over(self, prepared):
        names = {name.split("-0")[0] for name in contents(prepared)}
        assert names == {
            "glimpse-train.array_record",
            "glimpse-val.array_record",
            "index-train.jsonl",
            "index-val.jsonl",
            *("features.json", "dataset_info.json", "shards.json", "prepare.json", "report.json", "report.txt", ".lock"),
        }

    def test_encoding(self):
        record = Record("1", "é", "?", "!", (b"\xff\0", b""), ((), ((0.0, 0.25, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0))), (b"\x89", None))
        assert decode(encode(record, [(3, 4), (5, 6)])) == (record, ((3, 4), (5, 6)))


class TestReport:
    def test_counts_and_offenders(self, source, images, tmp_path):
        report = run(source, images, tmp_path / "out")
        assert (report.total, report.good, report.bad) == (ROWS, ROWS - 1, 1)
        assert report.splits == {"train": 17, "val": 5}
        (where, detail) = report.reasons["image broken"].first[0]
        assert where == "own.jsonl:6" and detail.startswith("broken.jpg: is truncated")
        saved = json.loads((tmp_path / "out" / "report.json").read_text())
        assert saved["reasons"]["image broken"] == {"count": 1, "first": [["own.jsonl:6", detail]]}
        assert "own.jsonl:6" in (tmp_path / "out" / "report.txt").read_text()

    def test_first_offenders_are_the_first(self, images, tmp_path):
        rows = [{"image": "none.jpg", "question": "?", "answer": "!", "boxes": [[1, 2, 3, 4]]}] * 30 + [row(0)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(fields) + "\n" for fields in rows))
        report = run(tmp_path / "a.jsonl", images, tmp_path / "out", max_bad_share=1.0)
        assert report.reasons["image missing"].count == 30
        assert [where for where, _ in report.reasons["image missing"].first] == [f"a.jsonl:{i}" for i in range(1, 21)]
        assert "... and 27 more" in report.text(3)


class TestLimits:
    def test_too_many_bad_rows_then_more_allowed(self, source, images, tmp_path, prepared):
        out = tmp_path / "out"
        with pytest.raises(TooManyBad, match=r"1 of 23 rows are bad.*--max-bad-share 0.01.*image broken.*own.jsonl:6") as caught:
            run(source, images, out, max_bad_share=0.01)
        assert caught.value.report.bad == 1 and (out / "report.txt").exists() and not (out / "dataset_info.json").exists()
        with pytest.raises(GlimpseError, match="has not finished"):
            open_prepared(out)
        run(source, images, out)
        assert same_data(out, prepared)

    def test_it_stops_early(self, images, tmp_path, monkeypatch):
        (tmp_path / "a.jsonl").write_text((json.dumps(row(0) | {"answer": ""}) + "\n") * 40)
        with pytest.raises(TooManyBad, match="8 of 40 rows are bad among the first 8"):
            run(tmp_path / "a.jsonl", images, tmp_path / "out")

    def test_all_bad(self, images, tmp_path):
        (tmp_path / "a.jsonl").write_text(json.dumps(row(0) | {"answer": ""}) + "\n")
        with pytest.raises(TooManyBad, match="all 1 rows are bad"):
            run(tmp_path / "a.jsonl", images, tmp_path / "out", max_bad_share=1.0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": "all"}, "--split"),
            ({"boxes": "inches"}, "--boxes"),
            ({"max_bad_share": 1.5}, "--max-bad-share"),
            ({"workers": 0}, "--workers"),
            ({"rows_per_shard": 0}, "--rows-per-shard"),
            ({"offenders": 21}, "--offenders"),
        ],
    )
    def test_settings(self, source, images, tmp_path, options, message):
        with pytest.raises(GlimpseError, match=message):
            run(source, images, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_folders(self, source, images, tmp_path):
        for bad, message in ((tmp_path / "none", "no such folder"), (source, "not a folder")):
            with pytest.raises(GlimpseError, match=message):
                run(source, bad, tmp_path / "out")
        for out, message in ((images, "holds other things"), (source, "not a folder"), ("gs://bucket/x", "local folder")):
            with pytest.raises(GlimpseError, match=message):
                run(source, images, out)


class TestResume:
    def test_interrupted_work_goes_on(self, source, images, tmp_path, prepared, monkeypatch):
        finish, done = work.finish, []

        def interrupted(chunk, job, checker):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(chunk.index)
            return finish(chunk, job, checker)

        monkeypatch.setattr(work, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source, images, tmp_path / "out")
        monkeypatch.setattr(work, "finish", lambda chunk, job, checker: done.append(chunk.index) or finish(chunk, job, checker))
        run(source, images, tmp_path / "out")
        assert done == [0, 1, 2, 3, 4, 5]
        assert same_data(tmp_path / "out", prepared)

    @pytest.mark.parametrize("steps", [1, 4, 7, 9, 11])
    def test_interrupted_while_finishing(self, source, images, tmp_path, prepared, monkeypatch, steps):
        """After any number of renames."""
        replace, left = Path.replace, [None]

        def counted(path, target):
            if left[0] is not None:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
            return replace(path, target)

        finalise = preparing._finalise
        monkeypatch.setattr(Path, "replace", counted)
        monkeypatch.setattr(preparing, "_finalise", lambda *plan: left.__setitem__(0, steps) or finalise(*plan))
        with pytest.raises(KeyboardInterrupt):
            run(source, images, tmp_path / "out")
        monkeypatch.undo()
        run(source, images, tmp_path / "out")
        assert same_data(tmp_path / "out", prepared)

    def test_killed_with_several_processes(self, source, images, tmp_path, prepared):
        """SIGKILL, then on with two processes: as if nothing had happened and one had done it."""
        code = f"""
import sys, time
from gp_jax.data import work
finish = work.finish
def slow(*args):
    result = finish(*args)
    print("done", flush=True)
    time.sleep(0.2)
    return result
work.finish = slow
from gp_jax.data.prepare import prepare
prepare([{str(source)!r}], {str(images)!r}, {str(tmp_path / "out")!r}, workers=1, rows_per_shard=4, progress=False)
"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"done\n" == process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 2 <= len(list((tmp_path / "out" / "parts").glob("*.json"))) < 6
        run(source, images, tmp_path / "out", workers=2)
        assert same_data(tmp_path / "out", prepared)

    def test_workers_die_with_their_parent(self, source, images, tmp_path):
        code = f"""
import multiprocessing, os, time
from gp_jax.data import work
from gp_jax.data.work import Job, _pool
from pathlib import Path
if __name__ == "__main__":
    pool = _pool(Job(Path({str(images)!r}), Path({str(tmp_path)!r}), None, "auto"), 1)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""
        (tmp_path / "parent.py").write_text(code)
        process = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE)
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and _alive(child):
            time.sleep(0.05)
        assert not _alive(child)

    def test_finished_work_is_only_reported(self, source, images, prepared, monkeypatch):
        before = contents(prepared)
        monkeypatch.setattr(work, "finish", None)
        assert run(source, images, prepared).good == ROWS - 1
        assert contents(prepared) == before

    def test_another_preparation_is_refused_or_replaced(self, source, images, tmp_path, prepared):
        out, other = tmp_path / "out", tmp_path / "own.jsonl"
        other.write_text("".join(json.dumps(row(i)) + "\n" for i in range(4)))
        run(other, images, out)
        (out / "notes.txt").write_text("mine")
        with pytest.raises(GlimpseError, match="another preparation.*sources.*--overwrite"):
            run(source, images, out)
        with pytest.raises(GlimpseError, match="another preparation.*split"):
            run(other, images, out, split="test")
        run(source, images, out, overwrite=True)
        assert (out / "notes.txt").read_text() == "mine"
        (out / "notes.txt").unlink()
        assert same_data(out, prepared)

    def test_one_at_a_time(self, source, images, tmp_path):
        with only_one(tmp_path / "out", "gp-jax prepare"), pytest.raises(GlimpseError, match="gp-jax prepare, process .* is writing there"):
            run(source, images, tmp_path / "out")

    def test_split_for_all(self, source, images, tmp_path):
        assert run(source, images, tmp_path / "out", split="test").splits == {"test": ROWS - 1}


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


class TestReading:
    def test_what_is_not_there(self, prepared, tmp_path):
        for folder, split, message in (
            (tmp_path / "none", "train", "no such folder"),
            (tmp_path, "train", "no dataset_info.json"),
            (prepared, "test", r"no split 'test' \(there are: train, val\)"),
        ):
            with pytest.raises(GlimpseError, match=message):
                open_prepared(folder, split)

    @pytest.mark.parametrize("damage", ["cut", "gone", "flipped", "info"])
    def test_damage_is_named(self, prepared, tmp_path, damage):
        for name, data in contents(prepared).items():
            (tmp_path / name).write_bytes(data)
        shard = tmp_path / "glimpse-train.array_record-00000-of-00006"
        data = bytearray(shard.read_bytes())
        middle = data.find(b"\xff\xd8") + 300  # of the first photograph
        data[middle : middle + 50] = bytes(50)
        if damage == "cut":
            shard.write_bytes(shard.read_bytes()[:-40000])
        elif damage == "gone":
            shard.unlink()
        elif damage == "flipped":
            shard.write_bytes(data)
        else:
            shard = tmp_path / "dataset_info.json"
            shard.write_text("{")
        with pytest.raises(GlimpseError, match=shard.name):
            source = open_prepared(tmp_path)
            source.entries, [source[i] for i in range(3)]


class TestReleased:
    """The released annotation files, with plain pictures of the sizes they state."""

    def test_training_and_benchmark(self, shared, tmp_path):
        files = sorted((shared / "visual_cot" / "train").glob("*.jsonl"))
        sizes = {}
        for path in files:
            for fields in map(json.loads, path.read_text().splitlines()[:60]):
                sizes.setdefault(f"cot/{fields['dataset']}/{fields['image']}", (fields["width"], fields["height"]))
            (tmp_path / path.name).write_text("\n".join(path.read_text().splitlines()[:60]))
        for path in sorted((shared / "visual_cot" / "benchmark").glob("*.json")):
            rows = json.loads(path.read_text())[:20]
            for fields in rows:
                name, _, box = fields["image"][1].partition("###")
                box = json.loads(box)
                old = sizes.get(name, (0, 0))
                sizes[name] = (max(old[0], box[2]), max(old[1], box[3]))
            (tmp_path / path.name).write_text(json.dumps(rows))
        for name, size in sizes.items():
            place = tmp_path / "images" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", size).save(place, quality=10)
        report = prepare([tmp_path], tmp_path / "images", tmp_path / "out", workers=1, progress=False)
        assert report.total == 4 * 60 + 13 * 20 and report.splits["val"] == 13 * 20
        assert set(report.reasons) == {"box outside the picture"}
        assert all(where.startswith("dude_cot_train.jsonl:") for where, _ in report.reasons["box outside the picture"].first)
        source = open_prepared(tmp_path / "out", "val")
        assert len(source) == 13 * 20 and all(len(source[i].boxes[0]) == 1 for i in range(0, len(source), 13))


class TestCommand:
    def command(self, capsys, *argv: object) -> tuple[int, str, str]:
        sys.argv = ["gp-jax", "prepare", *map(str, argv)]
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    @pytest.fixture(autouse=True)
    def _this_process(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.setattr(cli, "keep_memory", lambda: None)

    def test_it_reports(self, source, images, tmp_path, capsys):
        status, out, _ = self.command(capsys, source, "--images", images, "--out", tmp_path / "out", "--workers", 1)
        assert status == 0 and "23: 22 good, 1 bad" in out and "own.jsonl:6" in out and len(open_prepared(tmp_path / "out")) == 17

    def test_errors_are_one_line(self, source, images, tmp_path, capsys):
        args = (source, "--images", images, "--out", tmp_path / "out", "--workers", 1, "--max-bad-share", 0)
        status, out, err = self.command(capsys, *args)
        assert status == 1 and err.count("\n") == 1 and err.startswith("gp-jax: 1 of 23 rows are bad") and "own.jsonl:6" in out
        for args, message in (
            ((source, "--out", tmp_path), "--images is missing"),
            ((source, "--images", images), "--out is missing"),
            ((tmp_path / "none.jsonl", "--images", images, "--out", tmp_path / "out"), "no such file"),
        ):
            status, _, err = self.command(capsys, *args)
            assert status == 1 and message in err and err.count("\n") == 1

    def test_help(self, capsys):
        with pytest.raises(SystemExit):
            prepare_command.parse(["--help"])
        text = capsys.readouterr().out
        for name in ("--images", "--out", "--split", "--boxes", "--workers", "--max-bad-share", "--rows-per-shard", "--overwrite"):
            assert name in text

    def test_help_is_light(self):
        code = (
            "import sys, gp_jax.cli, gp_jax.commands.prepare; print([m for m in ('jax', 'tensorflow_datasets', 'PIL') if m in sys.modules])"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_workers_do_not_import_jax():
    code = "import sys, gp_jax.data.work; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)).stdout.strip() == "False"
