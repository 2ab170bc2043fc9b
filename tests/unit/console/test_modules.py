"""The page's modules that compute, in the browser they are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.browser import CHROMIUM, Watched

from .standin import StandIn

pytestmark = CHROMIUM


@pytest.fixture(scope="module")
def page(browser: Browser, running: StandIn) -> Iterator[Page]:
    """One for all: nothing here changes it."""
    watched = Watched(browser)
    watched.page.goto(f"{running.url}/console")
    yield watched.page
    watched.close(running.url)


def call(page: Page, module: str, expression: str, *arguments: Any) -> Any:
    """An expression over the module `m` and the arguments `a`."""
    script = f"async a => {{ const m = await import('{page.url}/{module}.js'); return {expression}; }}"
    return page.evaluate(script, list(arguments))


PIECES = [
    (["To", " sum", "</s>"], "To sum", ["To", " sum", ""]),  # a special token is in no text
    (["Hello", " there"], "Hello there", ["Hello", " there"]),
    ([" Hello", " there"], "Hello there", ["Hello", " there"]),  # the first space is gone
    (["Hello", "there"], "Hello there", ["Hello", " there"]),  # tokens that lack it
    (["a", "", "", "é", "b"], "aéb", ["a", "", "", "é", "b"]),  # the last token has the character
    (["a", "\ufffd", "\ufffd", "b"], "aéb", ["a", "é", "", "b"]),  # no token has it: the first takes it
    (["a", "\ufffd", "\ufffd"], "aé", ["a", "é", ""]),
    (["one", " two", " thr"], "one two t", ["one", " two", " t"]),  # a stop string cut it
    (["<think>", "a", "</think>", "b"], "ab", ["", "a", "", "b"]),
    (["a", "\n\n", "b"], "ab", ["a", "", "b"]),  # a parser took the white space
    (["x", "x"], "xx", ["x", "x"]),
    (["q", "z"], "entirely other", ["", ""]),
    ([], "text", []),
    (["a"], "", [""]),
]


@pytest.mark.parametrize(("tokens", "text", "parts"), PIECES)
def test_tokens_are_found_in_their_text(page: Page, tokens: list[str], text: str, parts: list[str]) -> None:
    expression = "m.align(a[0], a[1]).map(([start, end]) => a[1].slice(start, end))"
    assert call(page, "alignment", expression, tokens, text) == parts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_however_the_stream_is_cut(page: Page, size: int) -> None:
    sent = (
        'data: {"a": 1}\n\n: a comment\r\n\r\ndata: two\r\ndata:lines\r\n\r\nevent: x\rdata: three\r\rdata: unended\n'
    )
    pieces = [sent[start : start + size] for start in range(0, len(sent), size)]
    read = call(
        page,
        "events",
        "a[0].reduce(([p, all], x) => [p, [...all, ...p.push(x)]], [new m.EventParser(), []])[1]",
        pieces,
    )
    assert read == ['{"a": 1}', "two\nlines", "three"]


@pytest.mark.parametrize(
    ("gates", "best", "level"),
    [([0.2, 0.8], 1, 4), ([0.5, 0.5], 0, 3), ([0.5, -0.9], 1, 4), ([0, 0], -1, 0), ([0, 1], 1, 5), ([], -1, 0),
     ([0.1] * 10, 0, 1)],
)  # fmt: skip
def test_the_strongest_adapter_and_its_share(page: Page, gates: list[float], best: int, level: int) -> None:
    assert call(page, "gates", "[m.strongest(a[0]), m.level(a[0])]", gates) == [best, level]


def test_areas_stack_what_is_positive_and_hang_what_is_not(page: Page) -> None:
    drawn = call(page, "gates", "m.areas(a[0], 2)", [[0.25, 0.75], [0.5, -0.25]])
    assert (drawn["top"], drawn["bottom"]) == (1, -0.25)
    assert drawn["paths"] == ["M0 0.75H1V0.5H2V1H1V1H0Z", "M0 0H1V1.25H2V1H1V0.75H0Z"]
    assert call(page, "gates", "m.areas([], 2).paths") == ["", ""]


def test_adapters_differ_in_hue_and_line_until_there_are_thirty_two(page: Page) -> None:
    looks = call(page, "palette", "(p => Array.from({length: 33}, (_, i) => p.of(`a${i % 32}`)))(new m.Palette())")
    assert len(set(looks[:32])) == 32
    assert looks[32] == looks[0]
    assert len({look.split()[1] for look in looks[:4]}) == 4  # four are told apart without any colour
