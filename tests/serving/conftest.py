"""The page of `gp-jax serve` in a real Chromium, before a server whose answers are scripted: nothing is compiled."""

import os
import shutil

import numpy as np
import pytest
from http_tools import running, scripted


@pytest.fixture(scope="module")
def page_server(tmp_path_factory):
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
def page(browser, page_server):
    """The page, wide; behind the test nothing was asked of other hosts, nothing was refused by the policy, and no script has failed."""
    context = browser.new_context(viewport=dict(width=1280, height=900))
    found = context.new_page()
    found.set_default_timeout(90_000)  # a busy machine must not fail a test
    found.posts, addresses, complaints = [], [], []
    found.on("request", lambda request: (addresses.append(request.url), request.post_data and found.posts.append(request.post_data_json)))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
    found.goto(page_server.url)
    found.wait_for_selector("#model:has-text('tiny')")
    found.wait_for_selector("#samples button")
    yield found
    context.close()
    own = [url for url in addresses if not url.startswith(("data:", "blob:"))]
    assert own and all(url.startswith(f"{page_server.url}/") for url in own) and not complaints, (own, complaints)
