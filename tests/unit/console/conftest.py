"""One browser and one stand-in for all tests of this folder; each test has a page of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import TIMEOUT_MS, Watched, chromium

from .standin import StandIn, serving

expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="package")
def running() -> Iterator[StandIn]:
    with serving() as made:
        yield made


@pytest.fixture
def endpoint(running: StandIn) -> StandIn:
    running.reset()
    return running


@pytest.fixture
def page(browser: Browser, endpoint: StandIn) -> Iterator[Page]:
    watched = Watched(browser)
    watched.page.goto(f"{endpoint.url}/console")
    expect(watched.page.get_by_role("button", name="Send")).to_be_enabled()
    yield watched.page
    watched.close(endpoint.url)
