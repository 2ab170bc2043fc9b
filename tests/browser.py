"""A real Chromium, driven by Playwright: Debian's, since Playwright's own would have to be fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from .programs import found, needs

CHROMIUM = needs("chromium", package="chromium")
TIMEOUT_MS = 60_000  # of what a loaded machine takes; a test waits for no longer than it must


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser. While it is open this thread can run no event loop of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found("chromium"), chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


class Watched:
    """A page in a context of its own, and what it asked for and complained of."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(TIMEOUT_MS)
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        # The browser itself says of each refused request that it was.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def close(self, origin: str) -> None:
        """Close it; asserts that it asked nothing of anybody else, and that nothing went wrong in it."""
        self.context.close()
        assert [url for url in self.requests if not url.startswith(f"{origin}/")] == []
        assert self.complaints == []
