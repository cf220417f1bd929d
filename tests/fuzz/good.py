"""Good inputs to begin from, and pieces that make them bad."""

import io
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

QUESTION = "What color is the circle?"
FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)


OPCODES = b"()tuRbQ0123.aeicdgjhlNIJKLMBCUXVS\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95]}qrp"
GLOBALS = (
    b"cbuiltins\neval\n",
    b"cos\nsystem\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
)
PIECES = (
    *GLOBALS,
    b"(dq\x00",
    b"r\xff\xff\xff\x0f",
    b"j\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"B\xff\xff\xff\x7f",
    b"(K\x01K\x02u",
    b"}b",
    b"]" * 300,
    b"(" * 300,
    b"\x85" * 999,
)


STATEMENTS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10 ** 10 ** 9 }}",
    "{{ raise_exception('no') }}",
    "{{ lipsum.__globals__ }}",
    "{{ messages.nothing.there }}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ ('a' * 10000) | center(999999999) }}",
    "{% include 'config.json' %}",
    "{{ messages | tojson(indent=99999999) }}",
    "{{ range(99999) | list | string }}",
    "{% set x = namespace(a='aaaaaaaa') %}{% for i in range(99) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a }}",
    "\x1b[2J",
    "{{ strftime_now('%Y' * 9999) }}",
)


EXPRESSIONS = (
    r"(\w+\.?)*!",
    r"(?:a?){99999999}",
    r"(?:(?:(?:.{0,999}){0,999}){0,999}){0,999}!",
    "(" * 9999,
    r"(?=.*(.+)+\1\1\1x)",
    "[",
    "\\",
    "\x1b[2J\ud800",
)


REQUEST = "Please provide the bounding box coordinate of the region that can help you answer the question better."
ROWS = (
    {
        "image": "a.png",
        "question": QUESTION,
        "answer": "red",
        "boxes": [[1, 2, 30, 40]],
        "box_format": "pixel",
        "width": 56,
        "height": 84,
        "id": "7",
    },
    {"images": ["a.png", "b.jpg"], "question": QUESTION, "answers": ["red", "blue"], "boxes": [[[0.1, 0.2, 0.3, 0.4]], []], "split": "val"},
    {"image": "a.png", "question": QUESTION, "answer": 3, "mask": "a.png", "dataset": "d"},
    {
        "question_id": 5,
        "image": ["a.png", "a.png###[1, 2, 30, 20]"],
        "conversations": [
            {
                "from": "human",
                "value": f"<image>\nq {REQUEST}",
            },
            {"from": "gpt", "value": "[0.1, 0.2, 0.3, 0.4]"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "red"},
        ],
    },
)


REPLY = {"choices": [{"message": {"content": "score: 0.5"}}]}


PREDICTION = dict(
    task="t", sample="s", plan="dense", question="q", answer="a", prediction="b", family="f", kept=3, total=4, prefill_retention=0.5,
    metrics={"exact_match": 1.0, "iou": None}, boxes=[[0.1, 0.1, 0.5, 0.5]], grid=[2, 2], keep=[0, 1, 3], tokens=2, seconds={"vision": 0.1},
    more_grids=[], cuts=[[4, 3]], cached=3.0, ratio=0.5, sizes=[[56, 84]], peak=1000,
)  # fmt: skip


def bundled() -> Path:
    from gp_jax.pretrained.files import BUNDLED

    return BUNDLED["scenes"]


@cache
def picture(size: tuple[int, int] = (56, 84)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


@cache
def encoded(kind: str) -> bytes:
    """The picture in a format, with what cameras and editors put beside it."""
    sink, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    more = {} if kind in ("BMP", "GIF") else {"exif": exif.tobytes()}
    more |= {"icc_profile": bytes(200)} if kind in ("PNG", "JPEG", "WEBP") else {}
    picture().save(sink, kind, **more)
    return sink.getvalue()


@cache
def tensors() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    return {"a.weight": numbers, "a.bias": numbers[0], "b": numbers[:0], "c": np.full((), 3, np.float32)}


@cache
def torch_bytes() -> bytes:
    from gp_jax.pretrained.torch_file import write_torch

    with tempfile.TemporaryDirectory() as folder:
        write_torch(Path(folder) / "x.pt", {"attn": tensors(), "d": tensors()["a.bias"]})
        return (Path(folder) / "x.pt").read_bytes()
