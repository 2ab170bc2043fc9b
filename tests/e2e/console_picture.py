#!/usr/bin/env python3
"""Pictures of the page on the sample: docs/images/console-*.png. Its bundle's adapters go by their names."""

from __future__ import annotations

import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser import TIMEOUT_MS, chromium
from xloom.settings import SAMPLE

from .served import Served

IMAGES = Path(__file__).parents[2] / "docs" / "images"
NAMES = ["code", "docs", "json", "maths"]
CODE = "Write a function that reads a file."
MATHS = "Ben has 12 pens, gets 9 more and gives 4 away. How many pens are left?"
RECORD = "The answer is 42. Write it as a record."
LAPTOP = {"width": 1360, "height": 1000}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}


def settings() -> dict[str, Any]:
    """The sample, without a key, and a mixture by Arrow."""
    return {
        "adapters": [{"name": name, "source": str(SAMPLE / "adapters" / name)} for name in NAMES],
        "xlora": [{"name": "blend", "source": str(SAMPLE / "blend")}],
        "mixtures": [{"name": "routed", "adapters": NAMES, "routing": "arrow"}],
        "router": {},
    }


def opened(browser: Browser, url: str, **options: Any) -> Page:
    """The page, ready for greedy answers."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(f"{url}/console")
    expect(page.locator("#model option").first).to_be_attached(timeout=TIMEOUT_MS)
    page.locator("#temperature").evaluate("field => field.value = 0")
    return page


def ask(page: Page, text: str) -> None:
    """One message, and its whole answer."""
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".answer").last).not_to_have_attribute("aria-busy", "true", timeout=TIMEOUT_MS)
    expect(page.locator("#deployment-note")).to_contain_text("0 requests under way", timeout=TIMEOUT_MS)


def save(page: Page, name: str) -> None:
    """What is in view, as a file."""
    page.wait_for_timeout(300)  # until bars have moved
    Image.open(BytesIO(page.screenshot())).convert("RGB").save(IMAGES / f"console-{name}.png", optimize=True)


def take(url: str) -> None:
    """All pictures."""
    with chromium() as browser:
        page = opened(browser, url, viewport=LAPTOP)
        ask(page, CODE)
        ask(page, MATHS)
        page.locator(".answer").last.locator(".token.hued").nth(2).hover()
        save(page, "light")

        page = opened(browser, url, viewport=LAPTOP, color_scheme="dark")
        page.get_by_label("Model, adapter or mixture").select_option("base")
        page.get_by_label("Weight of code, as a number").fill("0.8")
        page.get_by_label("Weight of docs, as a number").fill("-0.3")
        page.get_by_label("Weight of json, as a number").fill("0.4")
        ask(page, CODE)
        page.locator(".answer").last.locator(".token.hued").nth(8).hover()
        save(page, "dark")

        page = opened(browser, url, **PHONE)
        ask(page, RECORD)
        page.locator(".token.hued").nth(10).tap()
        save(page, "phone")


def main() -> None:
    """Serve the sample for as long as it takes."""
    with tempfile.TemporaryDirectory() as folder:
        served = Served(Path(folder), settings())
        served.wait_ready()
        try:
            take(served.url)
        finally:
            served.stop()


if __name__ == "__main__":
    sys.exit(main())
