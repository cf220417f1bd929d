"""The server's page in a real Chromium, used as people use it. Answers are scripted."""

import io
import json
import re

import numpy as np
from http_tools import ANSWER, ask
from PIL import Image

QUESTION = "what is this?"
GROW = """(selector) => { window.seen = []; new MutationObserver(() => {
  const text = document.querySelector(selector)?.textContent; if (text && window.seen.at(-1) !== text) window.seen.push(text);
}).observe(document.body, { subtree: true, childList: true, characterData: true }); }"""
FILES = """([kind, files]) => { const data = new DataTransfer();
  for (const [name, type, bytes] of files) data.items.add(new File([Uint8Array.from(bytes)], name, { type }));
  const event = kind === 'paste' ? new ClipboardEvent(kind, { clipboardData: data, bubbles: true, cancelable: true })
    : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event); }"""
WIDTH = "() => document.documentElement.scrollWidth"


def png(size=(112, 84), seed=0) -> bytes:
    pixels, file = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def upload(page, *files, name="photo.png", kind="image/png"):
    page.set_input_files("#file", [dict(name=name, mimeType=kind, buffer=content) for content in files])


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


def test_upload_ask_stream_and_move_the_sliders(page, page_server):
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


def test_errors_are_one_line_and_nothing_is_lost(page, page_server):
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
    page_server.loop.inbox.limit = 0
    fails("its queue is full; try again in 3 s")
    page_server.loop.inbox.limit = 8
    page.context.set_offline(True)
    fails("The server cannot be reached.")
    page.context.set_offline(False)
    page.click("#send")
    assert whole(page) == ANSWER and page.text_content("#error") == ""


def test_an_answer_can_be_stopped(page, page_server):
    left, page_server.loop.pause = page_server.loop.left, 0.5
    page.fill("#question", "go on")
    page.press("#question", "Enter")
    page.wait_for_function("() => document.querySelector('#turns .text')?.textContent.length > 0")
    page.click("#stop")
    page.wait_for_selector("#stop", state="hidden")
    page_server.loop.pause = 0.01
    assert ANSWER.startswith(page.text_content("#turns .text")) and page.text_content("#error") == ""
    assert asked(page, "again", 1) == ANSWER and page_server.loop.left == left + 1


def test_a_key_is_asked_for_and_kept_in_the_tab(page, page_server):
    page_server.api.key = b"secret"
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
        page_server.api.key = None


def test_a_phone_by_keyboard_in_the_dark(browser, page_server, page):
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
