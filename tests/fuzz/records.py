"""Rows, pictures, arrays, replies, and what earlier runs left behind."""

import json
import random
from pathlib import Path

import numpy as np

from tests.fuzz.good import PREDICTION, QUESTION, REPLY, ROWS, encoded, picture
from tests.fuzz.mutations import any_value, as_json, changed, flipped
from tests.fuzz.registry import Made, model, processor, target


@target(10)
def rows(rng: random.Random, folder: Path) -> Made:
    """Annotation rows: prepared, and asked as an evaluation does. Bad rows are left out and named."""
    from gp_jax.data.checks import Checker
    from gp_jax.data.formats import BadRow, parse_row
    from gp_jax.data.work import index_line
    from gp_jax.evaluation.annotations import Annotations

    (folder / "a.png").write_bytes(encoded("PNG"))
    (folder / "b.jpg").write_bytes(encoded("JPEG"))
    lines = [as_json(rng, changed(rng, rng.choice(ROWS), rng.randint(0, 3))).replace(b"\n", b" ") for _ in range(3)]
    (folder / "rows.jsonl").write_bytes(b"\n".join([*lines, json.dumps(ROWS[0]).encode()]) + b"\n")

    def read() -> None:
        checker = Checker(folder)
        for number, line in enumerate(lines):
            try:
                record, sizes = checker.check(parse_row(line, f"rows.jsonl:{number}", "rows"))
            except BadRow:
                continue
            index_line(record, sizes).encode()
            for image in record.images:
                _decode(image)
        found = Annotations([folder / "rows.jsonl"], folder, 10)
        for number in range(len(found)):
            found[number]

    return read, sum(map(len, lines)) + 40_000


def _decode(image: bytes) -> None:
    from tests.fuzz.rooms import images

    images.decode(image, "picture")


@target(14)
def pictures(rng: random.Random, folder: Path) -> Made:
    """Pictures of every format."""
    from tests.fuzz.rooms import images

    kind = rng.choice([name for name in images.formats() if name != "MPO"])
    data = flipped(rng, encoded(kind)) if rng.random() < 0.8 else flipped(rng, encoded(kind)[:400]) + encoded(kind)[400:]
    path = folder / f"photo.{kind.lower()}"
    path.write_bytes(data)
    return lambda: (images.open_image(path), _decode(data)), len(data) + 2 * 20_000_000 // 4


@target(8)
def arrays(rng: random.Random, folder: Path) -> Made:
    """What `generate` takes, as a processor made it and then changed."""
    from tests.fuzz.rooms import read_samples

    inputs = dict(processor()([[picture()], []], [QUESTION, "Why?"]).inputs)
    for name in rng.sample(sorted(inputs), rng.randint(1, 2)):
        inputs[name] = array(rng, inputs[name])
    return lambda: read_samples(
        model(), *(inputs.get(name) for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"))
    ), 500_000


def array(rng: random.Random, value: np.ndarray | None) -> object:
    """An array that was changed, or something else."""
    if not isinstance(value, np.ndarray) or rng.random() < 0.25:
        return rng.choice(
            (None, 3, "x", [], [[1], [1, 2]], np.zeros((0, 3), np.int64), np.broadcast_to(np.float32(0), (10**6, 10**6)), any_value(rng))
        )
    action = rng.random()
    if action < 0.3:
        kind = rng.choice((np.float16, np.float64, np.int8, np.uint64, np.complex64, object, "U5", "M8[s]", bool))
        with np.errstate(all="ignore"):
            try:
                return value.astype(kind)
            except (ValueError, TypeError):
                return value[:0]
    if action < 0.5:
        return value[tuple(slice(rng.randint(0, 1), max(1, n - rng.randint(0, 2))) for n in value.shape)]
    if action < 0.6:
        return value.reshape(rng.choice(((-1,), (1, *value.shape), value.shape[::-1])))
    value = value.copy() if value.dtype.kind == "f" else value.astype(np.int64)
    extreme = (np.nan, np.inf, -1e30) if value.dtype.kind == "f" else (-1, 0, 2**31, 2**32, 2**62, -(2**63), 10**6, 5)
    value.reshape(-1)[rng.randrange(value.size)] = rng.choice(extreme)
    return value


@target(8)
def judge(rng: random.Random, folder: Path) -> Made:
    """Replies of a judge's server, and its verdicts in the cache."""
    import httpx2

    from gp_jax.evaluation import judge as judging
    from gp_jax.evaluation.settings import JudgeConfig
    from gp_jax.evaluation.verdicts import read_cache

    body = as_json(rng, changed(rng, REPLY, rng.randint(0, 2))) if rng.random() < 0.8 else rng.randbytes(rng.choice((0, 10, 10**6)))
    charset = rng.choice(("utf-8", "idna", "utf-16", "punycode", "nothing", "\xff", "unicode_escape", "rot13", "base64", "zlib"))
    headers = [(b"content-type", f"text/html; charset={charset}".encode("latin-1"))]
    headers += [(b"retry-after", str(rng.choice((0, -1, "nan", "x"))).encode())] if rng.random() < 0.3 else []
    status = rng.choice((200, 200, 200, 400, 403, 404, 503, 302, 204))
    line = as_json(
        rng, changed(rng, {"key": "k", "score": 0.5, "model": "m", "asked": ["q", "a", "b"], "verdict": "score: 1"}, rng.randint(0, 3))
    )
    (folder / "verdicts.jsonl").write_bytes(line.replace(b"\n", b" ") + b"\n")
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, headers=headers, content=body))

    def ask() -> None:
        for score in read_cache(folder / "verdicts.jsonl").values():
            assert 0 <= score <= 1, "a score outside 0..1"
        kind, config = httpx2.AsyncClient, JudgeConfig(url="http://localhost/v1", model="m", retries=1, patience=0, timeout=3)
        judging.httpx2.AsyncClient = lambda **options: kind(**{**options, "transport": transport})
        try:
            found = judging.judge(config, [("q", "a", "b")], folder / "new.jsonl", quiet=True)
        finally:
            judging.httpx2.AsyncClient = kind
        assert len(found.scores) + len(found.failures) == 1

    return ask, len(body) + len(line)


@target(6)
def side_files(rng: random.Random, folder: Path) -> Made:
    """What runs left behind: predictions, what they were made with, logged metrics."""
    from etils import epath

    from gp_jax.evaluation.command import claim
    from gp_jax.evaluation.results import merge_predictions, read_predictions
    from tests.fuzz.rooms import RunLog

    good = json.dumps(PREDICTION).encode()
    lines = [good, as_json(rng, changed(rng, PREDICTION, rng.randint(1, 3))).replace(b"\n", b" "), flipped(rng, good)]
    (folder / "predictions.jsonl").write_bytes(b"\n".join(lines) + rng.choice((b"", b"\n")))
    (folder / "made_with.json").write_bytes(as_json(rng, changed(rng, {"model": "m", "weights": ["a"]}, rng.randint(0, 2))))
    (folder / "metrics.jsonl").write_bytes(good + b"\n" + as_json(rng, changed(rng, {"step": 1, "group": "train", "loss": 1.0}, 1)))

    def read() -> None:
        claim(folder, {"model": "m", "weights": ["a"]})
        if (folder / "predictions.jsonl").exists():
            merge_predictions(folder / "predictions.jsonl")
            for found in read_predictions(folder / "predictions.jsonl"):
                found.mask()
                found.to_json().encode("utf-8", "backslashreplace")
        log = RunLog(epath.Path(folder), 3)
        log.write(4, {"loss": 1.0}, "train")
        log.close()

    return read, sum(map(len, lines)) + 10_000
