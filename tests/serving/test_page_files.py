"""The files of the server's page, and its keep rule, which must be the model's."""

import io
import re

import httpx2 as httpx
import jax
import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder
from PIL import Image

from gp_jax.pruning.rule import Prune, anchor_indices, keep_mask, limits
from gp_jax.serving.page import FOLDER

KEEP = """async ([cases, rule]) => { const { keepRule } = await import('./rule.js');
  return cases.map(own => keepRule(own, rule).flat()); }"""


@pytest.mark.quick
def test_files_are_the_page_s_own_and_need_no_key(page_server):
    held = {file.distribution_path for file in WheelBuilder(str(FOLDER.parents[2])).recurse_included_files()}
    assert held >= {f"gp_jax/serving/{FOLDER.name}/{path.name}" for path in FOLDER.iterdir()}, "the wheel has them"
    with httpx.Client(base_url=page_server.url) as client:
        for path in FOLDER.iterdir():
            address = "/" if path.name == "index.html" else f"/{path.name}"
            got = client.get(address)
            assert (
                got.status_code == 200
                and got.content == path.read_bytes()
                and "script-src 'self'" in got.headers["Content-Security-Policy"]
            )
            assert got.headers["Content-Type"].startswith({".js": "text/javascript", ".svg": "image/svg"}.get(path.suffix, "text/"))
            assert client.get(address, headers={"If-None-Match": got.headers["ETag"]}).status_code == 304
            assert client.head(address).status_code == 200 and client.head(address).content == b""
            text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
            assert not re.search(r"https?://|//[a-z]+\.|innerHTML|insertAdjacentHTML|document\.write|eval\(", text), path
        found = client.get("/samples").json()
        assert found["note"] == "" and len(found["samples"]) == 6
        for sample in found["samples"]:
            assert sample["question"] and Image.open(io.BytesIO(client.get(f"/{sample['picture']}").content)).size[0] >= 96
        assert client.get("/samples/6.png").status_code == 404
        (model,) = client.get("/v1/models").json()["data"]
        assert model["prune"]["reduce_threshold"] == 0.5 and model["limits"]["max_body"] == 2**20


RULES = [
    dict(),
    dict(reduce_threshold=0.95, min_remain_num=3),
    dict(reduce_threshold=1.0, min_remain_num=None),
    dict(reduce_threshold=0.05, max_remain_ratio=0.111),
    dict(reduce_threshold=0.2, max_remain_ratio=0.25, min_remain_num=5),
    dict(max_remain_ratio=0.0, min_remain_num=0),
    dict(fixed_remain_ratio=0.3),
    dict(fixed_remain_ratio=0.01, anchor_positions=["tl", "br"]),
    dict(reduce_threshold=0.7, anchor_positions=["tr", "bl"]),
]


def test_the_page_s_keep_rule_is_the_model_s(page):
    """On drawn maps with many ties, of one to three pictures; counts and places are equal."""
    rng, slots, rule_of = np.random.default_rng(5), 80, jax.jit(keep_mask)
    grids = [[(int(r), int(c)) for r, c in rng.integers(1, 6, (pictures, 2))] for pictures in [1] * 8 + [2, 3] * 8]
    totals = np.array([sum(r * c for r, c in own) for own in grids])
    logits = np.zeros((len(grids), slots), np.float32)
    logits[:] = rng.integers(-12, 13, logits.shape) / 4
    present = np.arange(slots) < totals[:, None]
    importance = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    for fields in RULES:
        always, anchors = np.zeros(logits.shape, bool), fields.get("anchor_positions", ())
        for row, own in zip(always, grids, strict=True):
            row[anchor_indices(anchors, own) if len(own) == 1 else []] = True
        expected = np.asarray(rule_of(logits, present, limits(Prune(**fields), totals, always)))
        cases = []
        for values, own in zip(importance, grids, strict=True):
            starts = np.cumsum([0, *(r * c for r, c in own)])
            parts = [values[start : start + r * c].reshape(r, c).tolist() for start, (r, c) in zip(starts, own, strict=False)]
            cases.append([dict(rows=len(part), columns=len(part[0]), importance=part) for part in parts])
        rule = {"reduce_threshold": 0.5, "min_remain_num": 1, **fields}
        for found, own, total in zip(page.evaluate(KEEP, [cases, rule]), expected, totals, strict=True):
            assert found == own[:total].tolist(), fields
