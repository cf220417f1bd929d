"""gp_jax as a model of lmms-eval: its requests without it, and a whole run with it where it is installed."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import run_tools
from PIL import Image

from gp_jax import GlimpseError, GlimpseVLM, tiny
from gp_jax.evaluation.lmms import ChatModel, sampling, stop

COLORS = ("red", "green", "blue", "yellow", "black")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms") / "model"
    tiny.make_checkpoint(folder, hf_config=run_tools.SMALL)
    return folder


def conversation(number: int) -> list[dict]:
    picture = Image.new("RGB", (28 * (3 + number % 2), 84), COLORS[number])
    return [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": "Which color?"}]}]


class Chat(ChatModel):
    """With what lmms-eval's own class brings."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.task_dict = {"t": {"test": list(range(len(COLORS)))}}
        self.partial = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *found: self.partial.append(found))


def requests(*settings) -> list:
    return [SimpleNamespace(args=("Which color?", conversation, one, n, "t", "test")) for n, one in enumerate(settings)]


def test_requests_are_answered_in_their_order(model):
    chat, vlm = Chat(str(model), max_remain_ratio=0.3, batch_size=2, device=None, max_batch_size=None), GlimpseVLM.from_pretrained(model)
    short, long = {"max_new_tokens": 2, "temperature": 0}, {"max_new_tokens": 5, "do_sample": False, "until": ["\n\n"]}
    answers = chat.generate_until(requests(short, long, short, long, short))
    for number, (answer, settings) in enumerate(zip(answers, (short, long, short, long, short), strict=True)):
        picture = conversation(number)[0]["content"][0]["url"]
        assert answer == vlm.answer(picture, "Which color?", prune=chat.prune, max_new_tokens=settings["max_new_tokens"]).text
    assert len(chat.partial) == 5 and 0 < chat.kept <= 0.3 * chat.total
    assert Chat(str(model), prune=False).prune is None


def test_conversations(model):
    """Several turns, pictures between words."""
    chat = Chat(str(model), system_prompt="Be brief.")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image", "url": "a"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "image", "url": "b"}]},
    ]
    request = SimpleNamespace(args=("", lambda doc: turns, {}, 0, "t", "test"))
    text, images = chat.prompt(chat.messages(request))
    assert images == ["a", "b"] and text.index("Be brief.") < text.index("one<|vision_start|>") < text.index("two") < text.index("red")
    with pytest.raises(GlimpseError, match="not video"):
        chat.prompt([{"role": "user", "content": [{"type": "video", "url": "x"}]}])


def test_settings():
    assert sampling({}) == dict(max_new_tokens=128, temperature=0.0)
    assert sampling({"temperature": 0.5, "top_p": 0.9, "top_k": None, "num_beams": 1})["top_p"] == 0.9
    assert sampling({"temperature": 0.5, "do_sample": False})["temperature"] == 0
    with pytest.raises(GlimpseError, match="num_beams=4"):
        sampling({"num_beams": 4})
    assert stop("red\nand green", ["\n"]) == "red\nand green" and stop("red. And", ". ") == "red" and stop(" red ", None) == "red"


def test_arguments_that_cannot_be(model):
    for options, message in (
        (dict(max_remain_rato=0.1), "does not take max_remain_rato"),
        (dict(prune=False, max_remain_ratio=0.1), "contradict"),
        (dict(method="random"), "fixed_remain_ratio"),
    ):
        with pytest.raises(GlimpseError, match=message):
            Chat(str(model), **options)


def test_the_package_does_not_need_lmms_eval():
    code = "import sys, gp_jax.evaluation.lmms; assert not {'torch', 'lmms_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


UTILS = """
from PIL import Image
def pictures(doc): return [Image.open(doc["image"]).convert("RGB")]
def question(doc, lmms_eval_specific_kwargs=None): return doc["question"]
def result(doc, results): return {"accuracy": float(results[0].strip().lower() == doc["answer"])}
"""
TASK = """
task: gp_jax_colors
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.result
generation_kwargs: {{max_new_tokens: 3, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
"""


def test_lmms_eval_runs(model, tmp_path):
    """The real one, on a task of its own, without a network."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed: pip install '.[lmms-eval]'")
    if "gp_jax" not in {point.name for point in importlib.metadata.entry_points(group="lmms_eval.models")}:
        pytest.skip("gp_jax was installed before it had the entry point: pip install -e .")
    rows = []
    for number, color in enumerate(COLORS):
        Image.fromarray(np.full((84, 84 + 28 * (number % 2), 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": str(tmp_path / f"{number}.png"), "question": "Which color?", "answer": color})
    (tmp_path / "data.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "utils.py").write_text(UTILS)
    (tmp_path / "task" / "colors.yaml").write_text(TASK.format(data=tmp_path / "data.json"))
    arguments = f"pretrained={model},glimpse={model},max_remain_ratio=0.111"
    command = [sys.executable, "-m", "lmms_eval", "--model", "gp_jax", "--model_args", arguments, "--tasks", "gp_jax_colors"]
    command += ["--include_path", str(tmp_path / "task"), "--batch_size", "2", "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=run_tools.environment() | offline, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    written = next((tmp_path / "out").rglob("*results.json"), None)  # lmms-eval returns 0 after an error too
    assert done.returncode == 0 and written, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(written.read_text())
    assert 0 <= found["results"]["gp_jax_colors"]["accuracy,none"] <= 1
    samples = [json.loads(line) for line in next((tmp_path / "out").rglob("*samples*.jsonl")).read_text().splitlines()]
    vlm = GlimpseVLM.from_pretrained(model)
    assert len(samples) == len(COLORS) and "visual tokens kept" in done.stdout
    for sample in samples:
        ours = vlm.answer(rows[sample["doc_id"]]["image"], "Which color?", prune=prune(vlm), max_new_tokens=3).text
        assert sample["filtered_resps"] == ours
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def prune(vlm):
    from gp_jax.evaluation.lmms import prune_rule

    return prune_rule(vlm, True, {"max_remain_ratio": 0.111})
