"""Folders of `gp-jax prepare` in which files were cut, replaced, or are none: what can be done again is, the rest is named."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from run_tools import full_disk

from gp_jax.data import prepare as preparing
from gp_jax.data import work
from gp_jax.data.prepare import prepare
from gp_jax.data.prepared import open_prepared
from gp_jax.errors import GlimpseError
from gp_jax.runtime.lock import only_one
from gp_jax.scenes.write import write as write_scenes

pytestmark = pytest.mark.quick

ROWS, SHARD = 12, "glimpse-train.array_record-00001-of-00003"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    Image.effect_noise((64, 48), 40).convert("RGB").save(home / "a.png")
    rows = [{"image": "a.png", "question": f"What is {i}?", "answer": "é", "boxes": [[1, 2, 30, 40]], "id": str(i)} for i in range(ROWS)]
    rows[3]["split"], rows[5]["answer"] = "val", ""
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(home, home / "whole")
    return home


def run(home: Path, out: Path, **options):
    return prepare([home / "rows.jsonl"], home, out, **{"workers": 1, "rows_per_shard": 4, "progress": False} | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def copied(home, tmp_path) -> Path:
    return Path(shutil.copytree(home / "whole", tmp_path / "copied"))


def stopped_before_the_end(home: Path, out: Path, monkeypatch, renames: int | None = 0) -> None:
    """All chunks are done; the end was interrupted after some shards got their final names."""
    replace, left = Path.replace, [renames]

    def counted(path, target):
        if path.suffix == ".shard":
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", counted)
    with pytest.raises(KeyboardInterrupt):
        run(home, out)
    monkeypatch.undo()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = [("00001.json", spoil) for spoil in (cut, Path.unlink, as_pipe, lambda path: path.write_text("[]"))]
DAMAGE += [
    ("00001.json", lambda path: path.write_bytes(b"\xff\xfe\n")),
    ("00001.json", lambda path: path.write_text('{"parts": {}, "report": 5}')),
]
DAMAGE += [(name, spoil) for name in ("00001-train.shard", "00001-train.index") for spoil in (cut, Path.unlink)]


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize(("name", "spoil"), DAMAGE)
def test_damaged_work_is_done_again(home, tmp_path, monkeypatch, capsys, renames, name, spoil):
    """Also a shard that has its final name already."""
    out = tmp_path / "out"
    stopped_before_the_end(home, out, monkeypatch, renames)
    path = out / "parts" / name
    spoil(path if path.exists() else out / SHARD)
    finish, done = work.finish, []
    monkeypatch.setattr(work, "finish", lambda chunk, *rest: done.append(chunk.index) or finish(chunk, *rest))
    run(home, out)
    assert contents(out) == contents(home / "whole")
    assert 1 in done and (len(done) == 1 or renames)
    assert spoil is Path.unlink or f"{name if renames < 2 or name != '00001-train.shard' else SHARD}: is" in capsys.readouterr().err


def test_a_folder_where_a_sidecar_belongs_is_named(home, tmp_path, monkeypatch):
    stopped_before_the_end(home, tmp_path / "out", monkeypatch)
    as_folder(tmp_path / "out" / "parts" / "00001.json")
    with pytest.raises(GlimpseError, match=r"00001\.json.*: cannot be written"):
        run(home, tmp_path / "out")


@pytest.mark.parametrize("spoil", [cut, Path.unlink, as_pipe, lambda path: path.write_bytes(path.read_bytes() + b"x")])
def test_a_shard_that_is_not_what_was_written_is_named_at_once(copied, home, spoil):
    spoil(copied / SHARD)
    open_prepared(copied, "val")
    for use in (lambda: open_prepared(copied), lambda: run(home, copied)):
        with pytest.raises(GlimpseError, match=re.escape(str(copied / SHARD))):
            use()


def test_without_sizes_a_shard_that_was_cut_is_named_when_it_is_read(copied):
    (copied / "shards.json").unlink()
    cut(copied / SHARD)
    with pytest.raises(GlimpseError, match=SHARD):
        open_prepared(copied)[4]


@pytest.mark.parametrize(
    "text",
    ["", "{", "\0", '{"id": 5}', '{"id": "0", "dataset": "x", "question": "?", "answer": "!", "sizes": [[0, 5]]}', "[" * 9999, "\n" * 99],
)
def test_a_damaged_index_is_read_from_the_records(copied, home, capsys, text):
    path = copied / "index-train.jsonl"
    path.write_text(text + "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    assert open_prepared(copied, progress=False).entries == open_prepared(home / "whole").entries
    assert capsys.readouterr().err.count(f"{path}: is damaged") == 1


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "[]",
            "5",
            "\0",
            "[" * 9999,
            '{"splits": 5}',
            '{"splits": [{"name": 7}]}',
        ),
        '{"splits": [{"name": "train", "shardLengths": ["-4"], "numBytes": "1"}]}',
        '{"splits": [{"name": "train", "shardLengths": ["99999999999999999"], "numBytes": "1"}]}',
        '{"splits": [{"name": "train", "shardLengths": ["4"], "filepathTemplate": "{NONSENSE}"}]}',
        '{"splits": [{"name": "train", "shardLengths": ["4"], "filepathTemplate": "/dev/zero"}]}',
    ],
)
def test_damaged_metadata_is_one_line(copied, text):
    (copied / "dataset_info.json").write_text(text)
    with pytest.raises(GlimpseError, match=re.escape(str(copied))):
        _ = open_prepared(copied)[0]


@pytest.mark.parametrize("name", ["dataset_info.json", "prepare.json"])
@pytest.mark.parametrize("spoil", [as_pipe, as_folder, lambda path: path.write_text("{")])
def test_files_that_are_none_are_named(copied, name, spoil):
    spoil(copied / name)
    with pytest.raises(GlimpseError, match=re.escape(name)):
        _ = open_prepared(copied).made_from


@pytest.mark.parametrize("spoil", [Path.unlink, as_pipe, as_folder, cut, lambda path: path.write_text('{"a": "b"}')])
def test_damaged_sizes_are_one_line(copied, capsys, spoil):
    spoil(copied / "shards.json")
    source = open_prepared(copied)
    assert len([source[i] for i in range(10)]) == 10
    assert capsys.readouterr().err.count(f"{copied / 'shards.json'}: is missing or damaged") == 1


@pytest.mark.parametrize("name", ["prepare.json", "report.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": -1}', '{"finished": true, "reasons": 5}', "\0"])
def test_what_a_finished_preparation_says_of_itself(copied, home, name, text):
    (copied / name).write_text(text)
    with pytest.raises(GlimpseError, match=r"--overwrite"):
        run(home, copied)
    run(home, copied, overwrite=True)
    assert contents(copied) == contents(home / "whole")


def test_data_of_others_is_not_touched(copied, home):
    (copied / "prepare.json").unlink()
    before = contents(copied)
    with pytest.raises(GlimpseError, match="holds other things"):
        run(home, copied, overwrite=True)
    assert contents(copied) == before


@pytest.mark.parametrize("room", [0, 100, 900, 8000])
def test_a_full_disk_is_one_line_and_nothing_is_lost(home, tmp_path, room):
    out = tmp_path / "out"
    with full_disk(room), pytest.raises(GlimpseError, match=rf"{out}.*(cannot be written).*File too large") as caught:
        run(home, out)
    assert "\n" not in str(caught.value) and not list(out.rglob("*.shard.partial"))
    run(home, out)
    assert contents(out) == contents(home / "whole")


def test_one_scenes_writer_at_a_time(tmp_path):
    out, scratch = tmp_path / "out", tmp_path / ".out.partial"
    with only_one(scratch, "gp_jax.scenes"), pytest.raises(GlimpseError, match="gp_jax.scenes, process .* is writing there"):
        write_scenes(out, "val", 2, progress=False)
    scratch.mkdir()
    (scratch / "index-val.jsonl").write_text("of one that was killed")
    with full_disk(5000), pytest.raises(GlimpseError, match=f"{tmp_path}.*cannot be written.*File too large"):
        write_scenes(out, "val", 2, progress=False)
    assert not out.exists()
    write_scenes(out, "val", 2, progress=False)
    assert len(open_prepared(out, "val").entries) == 2 and not scratch.exists()
    with pytest.raises(GlimpseError, match="~nobody-here"):
        write_scenes(Path("~nobody-here/x"), "val", 2)


def test_workers_meet_a_full_disk_too(home, tmp_path, monkeypatch):
    """An error of the system keeps its file's name on the way from a worker."""
    monkeypatch.setattr(preparing, "finish_all", lambda job, *rest: work.finish_all(job, *rest))

    def finished(executor, job, chunks):
        raise OSError(28, "No space left on device", str(job.parts / "00000-train.index"))

    monkeypatch.setattr(work, "_finished", finished)
    with pytest.raises(GlimpseError, match=r"00000-train\.index: cannot be written \(No space left on device\); run again"):
        run(home, tmp_path / "out")
