"""Pictures of the server's page: python -m benchmarks.serve_page OUT [--server http://127.0.0.1:8000]

Needs a running `gp-jax serve` and a Chromium. Takes the first sample, asks its question with the dense answer beside it, then a second
question, and writes the page as it looks then, whole and its map alone: wide and on a phone, light and dark.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from playwright.sync_api import Browser, sync_playwright

SIZES = {"wide": (1280, 900), "phone": (375, 812)}  # pixels


@dataclass(frozen=True)
class Args:
    """Take pictures of the page."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the pictures."""
    server: str = "http://127.0.0.1:8000"
    """Address of the server."""
    sample: int = 0
    """Number of the sample, from 0."""
    then: str = "what number is on the purple tag?"
    """A second question about it; empty: none."""
    scale: float = 1.0
    """Pixels of the pictures per pixel of the page."""


def talk(browser: Browser, args: Args, name: str, theme: str) -> None:
    """One conversation, and its picture."""
    width, height = SIZES[name]
    page = browser.new_page(viewport=dict(width=width, height=height), color_scheme=theme, device_scale_factor=args.scale)
    page.goto(args.server)
    page.locator("#samples button").nth(args.sample).click()
    page.locator("#both").check()
    for number in range(1 + bool(args.then)):
        if number:
            page.fill("#question", args.then)
        page.click("#send")
        page.locator("#turns > li").nth(number).locator("text=answer tokens").wait_for()
        page.wait_for_selector("#stop", state="hidden")
    page.screenshot(path=args.out / f"{name}_{theme}.png", full_page=True)
    page.locator("main > section").first.screenshot(path=args.out / f"{name}_{theme}_map.png")
    page.close()


def main() -> None:
    """Entry point."""
    args = tyro.cli(Args, prog="python -m benchmarks.serve_page", config=(tyro.conf.HelptextFromCommentsOff,))
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as runner:
        path = os.environ.get("GP_JAX_CHROMIUM") or shutil.which("chromium")
        browser = runner.chromium.launch(executable_path=path)
        for name in SIZES:
            for theme in ("light", "dark"):
                talk(browser, args, name, theme)
        browser.close()


if __name__ == "__main__":
    main()
