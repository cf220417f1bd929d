"""The command line: answers on real photographs, errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adapter_tools import tensors, write
from PIL import Image

from gp_jax import GlimpseError, GlimpseVLM, cli
from gp_jax.commands import ask
from gp_jax.tiny import make_checkpoint, make_picture


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_checkpoint(folder / "model")
    make_picture(folder / "scene.png")
    return folder


def fail(capsys, monkeypatch, *argv: str) -> str:
    """Runs the command, which must exit 1 with one line. Returns: the line."""
    monkeypatch.setattr(sys, "argv", ["gp-jax", *map(str, argv)])
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("gp-jax: ") and captured.err.count("\n") == 1
    return captured.err


def test_ask(home, capsys):
    cli.run(
        ["ask", str(home / "scene.png"), "What?", "--model", str(home / "model"), "--fixed-remain-ratio", "0.25", "--max-new-tokens", "4"]
    )
    shown = capsys.readouterr().out
    assert "48 of 192 kept (25.0%)" in shown and "to load the model" in shown and "decode" in shown
    assert "programs" in shown and "kept ones" in shown


def test_ask_json_overlay_and_several_photos(home, capsys, tmp_path):
    out, scene = tmp_path / "o.png", str(home / "scene.png")
    options = ["--model", str(home / "model"), "--max-new-tokens", "4", "--json"]
    cli.run(["ask", scene, scene, "Which?", *options, "--max-remain-ratio", "0.5", "--threshold", "0", "--overlay", str(out)])
    facts = json.loads(capsys.readouterr().out)
    assert facts["total_tokens"] == 2 * 192 and facts["kept_tokens"] == 192 and facts["retention"] == 0.5
    assert set(facts["programs"]) == {"compiled", "read", "reading"}
    assert set(facts["timings"]) >= {"libraries", "loading", "processing", "vision", "glimpse", "finish", "decode"}
    assert Image.open(out).size == (2 * 448 + 8, 336)
    cli.run(["ask", scene, "Which?", *options, "--no-prune"])
    assert json.loads(capsys.readouterr().out)["retention"] == 1.0


def test_ask_twice(home, capsys):
    words = ["ask", str(home / "scene.png"), "What?", "--model", str(home / "model"), "--max-new-tokens", "2", "--look"]
    cli.run(
        [*words, "--look-threshold", "1", "--look-floor", "0.3", "--look-cap", "0.3", "--look-sure", "0", "--fixed-remain-ratio", "0.1"]
    )
    shown = capsys.readouterr().out
    assert "19 of 192 kept" in shown and "chosen by a first look at 48" in shown and "look 0." in shown
    seen = float(shown.partition("picture seen")[2].split("%")[0])
    assert 10 < seen < 40
    cli.run([*words, "--look-sure", "1", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["seen_share"] == 1 and facts["first_look_tokens"] == 48, "an unsure map"
    with pytest.raises(GlimpseError, match="--look-cap needs --look"):
        cli.run([*words[:-1], "--look-cap", "0.5"])


def test_ask_with_an_adapter(home, capsys, tmp_path):
    adapter = write(tmp_path / "adapter", tensors(GlimpseVLM.from_pretrained(home / "model")))
    words = ["ask", str(home / "scene.png"), "What?", "--model", str(home / "model"), "--no-prune", "--json", "--max-new-tokens", "8"]
    said = []
    for more in ([], ["--adapter", str(adapter)]):
        cli.run([*words, *more])
        said.append(json.loads(capsys.readouterr().out)["answer"])
    assert said[0] != said[1]


@pytest.mark.quick
def test_config_file_sets_defaults(home, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(f"ask = dict(model={str(home / 'model')!r}, max_new_tokens=3, json=True, fixed_remain_ratio=0.5)")
    cli.run(["ask", str(home / "scene.png"), "What?", "--config", str(tmp_path / "mine.py"), "--fixed-remain-ratio", "0.25"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["generated_tokens"] == 3 and facts["retention"] == 0.25, "the command line wins"


@pytest.mark.quick
@pytest.mark.parametrize(
    "words, inputs",
    [
        (["--model", "m", "--", "photo.png", "--what?"], ("photo.png", "--what?")),
        (["photo.png", "--model", "m", "--", "--what?"], ("photo.png", "--what?")),
        (["photo.png", "--model=m", "--", "-x.png", "--", "--model"], ("photo.png", "-x.png", "--", "--model")),
        (["photo.png", "-", "--threshold", "-0.5", "--model", "m"], ("photo.png", "-")),
        (["--config", str(Path(__file__).parents[2] / "configs" / "qwen2_5_vl_3b.py"), "--model", "m", "--", "a", "-b"], ("a", "-b")),
    ],
    ids=str,
)
def test_two_dashes_end_the_options_wherever_they_stand(words, inputs):
    args = ask.parse(words)
    assert args.inputs == inputs and args.model == "m"


@pytest.mark.quick
@pytest.mark.parametrize("word", ["--what?", "-what is this?", "--modle", "--what\n\x1b=5"])
def test_a_question_that_begins_with_dashes_is_told_where_to_stand(word):
    with pytest.raises(GlimpseError, match=r"no such option.*behind --, at the end: -- ") as error:
        ask.parse(["photo.png", word, "--model", "m"])
    assert "\n" not in str(error.value) and ("did you mean --model?" in str(error.value)) == (word == "--modle")


@pytest.mark.quick
def test_shipped_presets_are_valid():
    for size in ("3b", "7b"):
        path = Path(__file__).parents[2] / "configs" / f"qwen2_5_vl_{size}.py"
        assert ask.config_defaults(path)["model"].startswith("Qwen/")


def test_errors_are_one_line(home, capsys, monkeypatch, tmp_path):
    scene, model = home / "scene.png", home / "model"
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(scene.read_bytes()[:900])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bad.py").write_text("ask = dict(no_such_option=1)")
    overlay, folder, bare = tmp_path / "o.png", tmp_path / "dir.png", tmp_path / "bare"
    folder.mkdir()
    bare.mkdir()
    base = (
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    for name in base:
        (bare / name).write_bytes((model / name).read_bytes())
    for argv, message in (
        (["ask", tmp_path / "none.png", "q", "--model", model], "file is missing"),
        (["ask", tmp_path / "text.png", "q", "--model", model], "is not an image"),
        (["ask", tmp_path / "cut.png", "q", "--model", model], "is truncated or damaged"),
        (["ask", scene, "q", "--model", model, "--max-image-pixels", "1000"], "more than the limit of 1000"),
        (["ask", scene, "  ", "--model", model], "the question is empty"),
        (["ask", scene, "--model", model], "at least one photo and a question"),
        (["ask", scene, "q"], "--model is missing"),
        (["ask", scene, "q", "--model", tmp_path / "nowhere"], "no such folder"),
        (["ask", scene, "q", "--model", tmp_path / "odd"], "model_type 'gpt2' is not supported"),
        (["ask", scene, "q" * 70000, "--model", model], "longer than the 'prompt' ladder"),
        (["ask", scene, "q", "--model", model, "--max-remain-ratio", "3"], "max_remain_ratio=3.0: must be at most 1"),
        (["ask", scene, "q", "--model", model, "--dtype", "int8"], "--dtype int8"),
        (["ask", scene, "q", "--model", bare, "--max-remain-ratio", "0.1"], "options that prune need a glimpse"),
        (["ask", scene, "q", "--model", model, "--no-prune", "--threshold", "0.1"], "--no-prune excludes"),
        (["ask", scene, "q" * 9, "--model", "x" * 300], "is not a path"),
        (["ask", "x" * 5000, "q", "--model", model], "is not a path"),
        (["ask", scene, "q\udcff", "--model", model], "is not valid text"),
        (["ask", scene, "q", "--model", model, "--seed", str(2**70)], "seed="),
        (["ask", scene, "q", "--model", model, "--overlay", folder], "is a folder"),
        (["ask", scene, "say <|image_pad|>", "--model", model], "the question holds the image placeholder <|image_pad|>"),
        (["ask", scene, "q", "--model", model, "--overlay", tmp_path / "no" / "o.png"], "does not exist"),
        (["ask", scene, "q", "--model", model, "--config", tmp_path / "bad.py"], "needs a dict `ask`"),
        (["askk", scene], "did you mean 'ask'?"),
        (["juggle"], "unknown command 'juggle'"),
    ):
        assert message in fail(
            capsys, monkeypatch, *argv, *(["--overlay", overlay] if argv[0] == "ask" and "--overlay" not in argv else [])
        )
    assert not overlay.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.quick
def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr(ask, "run", lambda args: 1 / 0)
    assert "unexpected ZeroDivisionError: division by zero" in fail(capsys, monkeypatch, "ask")


def test_answer_takes_paths_images_arrays_and_batches(home):
    from gp_jax import GlimpseVLM, Prune

    vlm = GlimpseVLM.from_pretrained(home / "model")
    picture = Image.open(home / "scene.png")
    options = dict(prune=Prune(fixed_remain_ratio=0.25), max_new_tokens=5)
    one = vlm.answer(picture, "What?", **options)
    many = vlm.answer([str(home / "scene.png"), [picture, np.asarray(picture)], None], ["What?", "Which?", "Why?"], **options)
    assert one.text == many[0].text and one.kept == 48 and one.keep[0].shape == (12, 16)
    assert [m.total for m in many] == [192, 384, 0] and [len(m.keep) for m in many] == [1, 2, 0]
    assert many[2].overlay() is None and many[2].retention == 1.0
    grown: list[str] = []
    assert vlm.answer(picture, "What?", on_text=grown.append, **options).text == grown[-1] == one.text
    for images, questions in (([], []), (None, 5), ([picture], ["a", "b"])):
        with pytest.raises(GlimpseError, match="questions"):
            vlm.answer(images, questions)
    maps = vlm.glimpse(picture, "What?")
    assert maps[0].shape == (12, 16) and ((maps[0] >= 0) & (maps[0] <= 1)).all()


def test_every_photograph(shared, golden_vlm):
    """All eight files and formats, scaled down for speed and in one bucket; the largest has a test of its own."""
    from gp_jax import GlimpseVLM, Ladder, Ladders
    from gp_jax.processing.images import open_image

    ladders = Ladders(patches=Ladder("patches", (1280,)), prompt=Ladder("prompt", (384,)), kept=Ladder("kept", (384,)))
    vlm = GlimpseVLM(golden_vlm.model, golden_vlm.hf_config, golden_vlm.processor, ladders=ladders)
    photos = sorted((shared / "photos").iterdir())
    assert len(photos) == 8
    for path in photos:
        picture = open_image(path)
        picture.thumbnail((280, 280))
        answer = vlm.answer(picture, "What is there?", max_new_tokens=4)
        patches = golden_vlm.processor.image_processor.get_number_of_image_patches(picture.height, picture.width)
        assert answer.total == answer.keep[0].size == patches // 4
        assert answer.kept == answer.keep[0].sum() > 0
        assert answer.overlay().size == answer.images[0].size == picture.size


def test_a_large_photograph_in_little_memory(shared, golden_folder, tmp_path):
    """street.jpg at half of its sides, 3,500 visual tokens: attention scores of one full block take 1.6 GB if ever held at once."""
    from gp_jax.processing.images import open_image

    picture, street = open_image(shared / "photos" / "street.jpg"), str(tmp_path / "street.png")
    picture.resize([side // 2 for side in picture.size]).save(street)
    code = (
        "import sys; from pathlib import Path; from gp_jax.cli import run; run(sys.argv[1:]);"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"  # ru_maxrss would begin with the parent's
    )
    argv = ["ask", street, "What is there?", "--model", str(golden_folder), "--json", "--max-new-tokens", "4"]
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=1"}
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, check=True)
    facts, peak = done.stdout.splitlines()
    assert 3400 < json.loads(facts)["total_tokens"] < 3700
    assert int(peak) * 1024 < 1.7e9
