"""The server's page in a real Chromium. Answers are scripted; nothing is compiled but the keep rule, to compare with."""

import io
import json
import os
import re
import shutil

import httpx2 as httpx
import jax
import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder
from http_tools import ANSWER, ask, running, scripted
from PIL import Image

from gp_jax.pruning.rule import Prune, anchor_indices, keep_mask, limits
from gp_jax.serving.page import FOLDER

QUESTION = "what is this?"
GROW = """(selector) => { window.seen = []; new MutationObserver(() => {
  const text = document.querySelector(selector)?.textContent; if (text && window.seen.at(-1) !== text) window.seen.push(text);
}).observe(document.body, { subtree: true, childList: true, characterData: true }); }"""
FILES = """([kind, files]) => { const data = new DataTransfer();
  for (const [name, type, bytes] of files) data.items.add(new File([Uint8Array.from(bytes)], name, { type }));
  const event = kind === 'paste' ? new ClipboardEvent(kind, { clipboardData: data, bubbles: true, cancelable: true })
    : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event); }"""
KEEP = """async ([cases, rule]) => { const { keepRule } = await import('./rule.js');
  return cases.map(own => keepRule(own, rule).flat()); }"""
WIDTH = "() => document.documentElement.scrollWidth"


def png(size=(112, 84), seed=0) -> bytes:
    pixels, file = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def upload(page, *files, name="photo.png", kind="image/png"):
    page.set_input_files("#file", [dict(name=name, mimeType=kind, buffer=content) for content in files])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GP_JAX_API_KEY", raising=False)
        made = scripted(tmp_path_factory.mktemp("tiny"), api_key=None, max_pixels=100_000)
        made.loop.importance = lambda count: np.linspace(0.02, 0.98, count, dtype=np.float32)
        with running(made):
            yield made


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("GP_JAX_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("no Chromium here: Debian's package is chromium, and GP_JAX_CHROMIUM names another one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as runner:
        found = runner.chromium.launch(executable_path=path, timeout=120_000)
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    """The page, wide; behind the test nothing was asked of other hosts, nothing was refused by the policy, and no script has failed."""
    context = browser.new_context(viewport=dict(width=1280, height=900))
    found = context.new_page()
    found.set_default_timeout(90_000)  # a busy machine must not fail a test
    found.posts, addresses, complaints = [], [], []
    found.on("request", lambda request: (addresses.append(request.url), request.post_data and found.posts.append(request.post_data_json)))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
    found.goto(server.url)
    found.wait_for_selector("#model:has-text('tiny')")
    found.wait_for_selector("#samples button")
    yield found
    context.close()
    own = [url for url in addresses if not url.startswith(("data:", "blob:"))]
    assert own and all(url.startswith(f"{server.url}/") for url in own) and not complaints, (own, complaints)


def whole(page, number=0, side=1):
    """Waits for an answer's end. Returns: its text."""
    card = page.locator("#turns > li").nth(number).locator(f".answer:nth-child({side}) .text[aria-busy=false]")
    card.wait_for()
    page.wait_for_selector("#stop", state="hidden")
    return card.text_content()


def asked(page, text=QUESTION, number=0):
    page.fill("#question", text)
    page.press("#question", "Enter")
    return whole(page, number)


@pytest.mark.quick
def test_files_are_the_page_s_own_and_need_no_key(server):
    held = {file.distribution_path for file in WheelBuilder(str(FOLDER.parents[2])).recurse_included_files()}
    assert held >= {f"gp_jax/serving/{FOLDER.name}/{path.name}" for path in FOLDER.iterdir()}, "the wheel has them"
    with httpx.Client(base_url=server.url) as client:
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


def test_upload_ask_stream_and_move_the_sliders(page, server):
    upload(page, png())
    page.wait_for_selector("#pictures img")
    page.evaluate(GROW, "#turns .text")
    assert page.is_hidden("#rule") and asked(page) == ANSWER
    seen = page.evaluate("() => window.seen")
    assert len(seen) > 4 and all(ANSWER.startswith(text) for text in seen) and seen[-1] == ANSWER, "it grew on the page"
    assert page.get_attribute("#turns .text", "aria-live") == "polite" and page.evaluate("() => document.activeElement.id") == "question"
    look = "() => { const own = document.querySelector('#pictures canvas'); return [own.width, own.toDataURL()]; }"
    width, before = page.evaluate(look)
    assert width > 100 and page.text_content("#kept") == "Kept 6 of 12 visual tokens (50.0\xa0%)"
    for slider, key, text in (
        ("#threshold", "ArrowRight", "Kept 6 of 12 "),
        ("#threshold", "PageUp", "Kept 5 of 12 "),
        ("#threshold", "End", "Kept 1 of 12 "),  # min_remain_num
        ("#threshold", "Home", "Kept 12 of 12 "),
        ("#cap", "PageDown", "Kept 10 of 12 "),
        ("#cap", "Home", "Kept 1 of 12 "),
    ):
        page.focus(slider)
        page.keyboard.press(key)
        assert page.text_content("#kept").startswith(text), (slider, key)
    after = page.evaluate(look)[1]
    assert after != before and len(page.posts) == 1, "the map has changed and nothing was asked"
    for box in ("#show-kept", "#show-heat"):
        page.uncheck(box)
        assert page.evaluate(look)[1] != after
        after = page.evaluate(look)[1]
    page.click("#own-rule")
    assert page.text_content("#kept").startswith("Kept 6 of 12 ") and page.text_content("#threshold-value") == "above 0.5"
    page.focus("#threshold")
    page.keyboard.press("Home")
    page.click("text=Ask again")
    assert whole(page) == ANSWER and page.text_content("#kept").startswith("Kept 12 of")
    assert [post.get("prune") for post in page.posts] == ["auto", {"reduce_threshold": 0, "max_remain_ratio": None}]


def test_dense_beside_pruned_and_several_turns(page):
    upload(page, png(), png(seed=1))
    page.check("#both")
    asked(page, "which <b>one</b>?")
    assert whole(page, side=2) == ANSWER and page.locator("#turns b").count() == 0, "what was typed is text"
    rows = dict(re.findall(r"([a-z ]+)\t(.+)", page.inner_text("#turns table")))
    assert rows["visual tokens"] == "24\t24" and rows["kept of them"] == "12\t24" and rows["share kept"] == "50.0\xa0%\t100.0\xa0%"
    assert all(re.fullmatch(r"\d+\.\d\d s\t\d+\.\d\d s", rows[name]) for name in ("first token", "whole answer"))
    page.uncheck("#both")
    asked(page, "and on the left?", 1)
    first, dense, second = page.posts
    assert (first["prune"], dense["prune"], second["prune"]) == ("auto", None, "auto") and first["messages"] == dense["messages"]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == first["messages"][0] and second["messages"][1]["content"] == ANSWER
    assert sum(part["type"] == "image_url" for part in first["messages"][0]["content"]) == 2
    page.locator("#turns > li").nth(1).locator("text=Compare with dense").click()
    assert whole(page, 1, side=2) == ANSWER and page.posts[3] == second | {"prune": None}
    page.locator("#turns > li").nth(0).locator("text=Map").click()
    assert page.locator("#turns button[aria-pressed=true]").count() == 1
    page.click("#reset")
    assert page.locator("#turns > li").count() == 0 and page.locator("#pictures img").count() == 0
    asked(page, "a text alone")
    assert page.posts[-1]["messages"] == ask("a text alone")


def test_errors_are_one_line_and_nothing_is_lost(page, server):
    def fails(words, pictures=1):
        page.fill("#question", QUESTION)
        page.click("#send")
        page.wait_for_selector(f"#error:has-text({json.dumps(words)})")
        page.wait_for_selector("#stop", state="hidden")
        assert page.input_value("#question") == QUESTION and page.locator("#turns > li").count() == 0
        assert page.locator("#pictures img").count() == pictures

    page.click("#send")
    page.wait_for_selector("#error:has-text('Type a question first.')")
    for name, kind, words in (
        ("notes.txt", "text/plain", "notes.txt is not a picture (text/plain)"),
        ("a.png", "image/png", "a.png is not"),
    ):
        upload(page, b"hello", name=name, kind=kind)
        page.wait_for_selector(f"#file-error:has-text('{words}')")
    upload(page, png((400, 400)))
    page.wait_for_selector("#pictures img")
    fails("more than the limit of 100000")
    upload(page, png((600, 600), 1))
    page.wait_for_selector("#pictures figure:nth-child(2)")
    sent = len(page.posts)
    fails("the server takes 1.0 MB (--max-body)", 2)
    assert len(page.posts) == sent
    for _ in range(2):
        page.click("text=Remove")
    upload(page, png())
    server.loop.inbox.limit = 0
    fails("its queue is full; try again in 3 s")
    server.loop.inbox.limit = 8
    page.context.set_offline(True)
    fails("The server cannot be reached.")
    page.context.set_offline(False)
    page.click("#send")
    assert whole(page) == ANSWER and page.text_content("#error") == ""


def test_an_answer_can_be_stopped(page, server):
    left, server.loop.pause = server.loop.left, 0.5
    page.fill("#question", "go on")
    page.press("#question", "Enter")
    page.wait_for_function("() => document.querySelector('#turns .text')?.textContent.length > 0")
    page.click("#stop")
    page.wait_for_selector("#stop", state="hidden")
    server.loop.pause = 0.01
    assert ANSWER.startswith(page.text_content("#turns .text")) and page.text_content("#error") == ""
    assert asked(page, "again", 1) == ANSWER and server.loop.left == left + 1


def test_a_key_is_asked_for_and_kept_in_the_tab(page, server):
    server.api.key = b"secret"
    try:
        page.reload()
        page.wait_for_selector("#key-form")
        for key in ("wrong", "secret"):
            page.fill("#key", key)
            page.press("#key", "Enter")
            if key == "wrong":
                page.wait_for_selector("#error:has-text('the API key is missing or wrong')")
        page.wait_for_selector("#key-form", state="hidden")
        assert asked(page) == ANSWER
        kept = "() => [sessionStorage.getItem('gp-jax-key'), localStorage.length, document.cookie]"
        assert page.evaluate(kept) == ["secret", 0, ""]
    finally:
        server.api.key = None


def test_a_phone_by_keyboard_in_the_dark(browser, server, page):
    light = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.set_viewport_size(dict(width=375, height=700))
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != light and page.evaluate(WIDTH) <= 375
    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate("() => document.activeElement.id || document.activeElement.tagName"))
    assert order == ["A", "reset", "file", "SUMMARY", "BUTTON"]
    page.keyboard.press("Enter")  # the first sample
    page.wait_for_selector("#pictures img")
    assert page.input_value("#question") and page.evaluate("() => document.activeElement.id") == "question"
    page.check("#both")
    page.press("#question", "Enter")
    assert whole(page, side=2) == ANSWER and page.evaluate(WIDTH) <= 375
    box = page.locator("#pictures .frame").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375
    for name in page.evaluate(
        "() => [...document.querySelectorAll('button, input, textarea')].filter(own => own.offsetParent).map(own =>"
        " own.labels?.length ? own.labels[0].textContent : own.textContent.trim())"
    ):
        assert name, "every control has a name"


def test_drop_and_paste(page):
    for kind, seed in (("drop", 0), ("paste", 1)):
        page.evaluate(FILES, [kind, [["", "image/png", list(png(seed=seed))]]])
        page.wait_for_selector(f"#pictures figure:nth-child({seed + 1})")
    page.evaluate(FILES, ["drop", []])
    page.wait_for_selector("#file-error:has-text('That is no file')")
    assert asked(page) == ANSWER and page.locator("#pictures canvas").count() == 2
