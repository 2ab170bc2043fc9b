"""The page's files: which there are, how they are sent, and what they may not hold."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from xloom.router.console import FILES, FOLDER, PAGE, attach_console
from xloom.router.errors import CodedErrors
from xloom.router.guard import Guard
from xloom.router.keys import KeyDigest, Keys
from xloom.router.routes import access, keep_listed

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def client(*, console: bool = True) -> httpx.AsyncClient:
    """An endpoint with a key, and the page unless told otherwise."""
    app = FastAPI()
    if console:
        attach_console(app)
    keep_listed(app)
    keys = Keys(KeyDigest.of("user-key"), None)
    guarded: Any = CodedErrors(Guard(app, partial(access, app), keys, local=True))
    return httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://router")


def test_the_table_names_every_file_there_is() -> None:
    assert sorted(FILES.values()) == sorted(file.name for file in FOLDER.iterdir())


@pytest.mark.parametrize(("path", "name"), FILES.items())
async def test_each_file_comes_without_a_key_as_what_it_is(path: str, name: str) -> None:
    async with client() as http:
        answer = await http.get(path)
        assert answer.status_code == 200
        assert answer.content == (FOLDER / name).read_bytes()
        assert answer.headers["content-type"] == TYPES[f".{name.rpartition('.')[2]}"]
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = dict(each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert not re.search(r"unsafe|\*|https?:|data:", answer.headers["content-security-policy"])
        head = await http.head(path)
        assert (head.status_code, head.headers["etag"]) == (200, answer.headers["etag"])


async def test_a_file_that_is_known_is_not_sent_again() -> None:
    async with client() as http:
        tag = (await http.get(PAGE)).headers["etag"]
        for known in (tag, f'"other", W/{tag}', "*"):
            answer = await http.get(PAGE, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
            assert answer.headers["content-security-policy"]
        assert (await http.get(PAGE, headers={"If-None-Match": '"other"'})).status_code == 200
        assert (await http.get("/console/main.js")).headers["etag"] != tag


async def test_a_slash_too_many_leads_to_the_page() -> None:
    async with client() as http:
        answer = await http.get("/console/")
        assert (answer.status_code, answer.headers["location"]) == (308, "../console")


@pytest.mark.parametrize(
    "path",
    ["/console/index.html", "/console/../settings.py", "/console/%2e%2e/settings.py", "/console/..%2fsettings.py",
     "/console//main.js", "/console/main.js/", "/console/./main.js%00", "/console/__init__.py",
     "/console/..\\settings.py", "/consoles", "/Console"],
)  # fmt: skip
async def test_nothing_else_is_there(path: str) -> None:
    async with client() as http:
        assert (await http.get(path)).status_code == 401  # as any path that is not: the key is asked for first
        answer = await http.get(path, headers={"Authorization": "Bearer user-key"}, follow_redirects=False)
        assert answer.status_code in (307, 404), answer.text
        assert (await http.post("/console")).status_code == 405


async def test_the_page_can_be_left_out() -> None:
    async with client(console=False) as http:
        for path in FILES:
            answer = await http.get(path, headers={"Authorization": "Bearer user-key"})
            assert answer.status_code == 404


# What is in the files.


class _Page(HTMLParser):
    """Every tag of the page, and text inside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def page() -> _Page:
    parsed = _Page()
    parsed.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    return parsed


def test_the_page_has_nothing_inline_and_asks_its_own_files_alone(page: _Page) -> None:
    assert page.inline == []
    for _, attributes in page.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
        for name in ("src", "href"):
            address = attributes.get(name)
            assert address is None or address.startswith("#") or f"/{address}" in FILES


def test_every_control_of_the_page_has_a_label(page: _Page) -> None:
    labelled = {attributes.get("for") for tag, attributes in page.tags if tag == "label"}
    for tag, attributes in page.tags:
        if tag in ("input", "select", "textarea") and attributes.get("type") != "checkbox":
            assert attributes["id"] in labelled
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))


def test_scripts_make_no_markup_and_name_no_host() -> None:
    for file in FOLDER.glob("*.js"):
        code = re.sub(r"/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\.style\b"
        assert re.findall(rf"{markup}|\beval\b|new Function|localStorage|cookie", code) == []
        assert re.findall(r"https?:", code.replace("http://www.w3.org/2000/svg", "")) == []
        for imported in re.findall(r'from "([^"]+)"', code):
            assert imported.startswith("./")
            assert f"{PAGE}/{imported[2:]}" in FILES


# The hues: WCAG 2.2's 3:1 for graphics against the page, and apart for the colour-blind (Machado et al. 2009).

Colour = tuple[float, float, float]  # linear RGB, 0 to 1
VISIONS: dict[str, list[list[float]]] = {
    "full": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def colour(written: str) -> Colour:
    channels = [int(written[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
    return red, green, blue


def seen(each: Colour, vision: str) -> Colour:
    red, green, blue = (
        min(1.0, max(0.0, sum(a * b for a, b in zip(row, each, strict=True)))) for row in VISIONS[vision]
    )
    return red, green, blue


def contrast(one: Colour, other: Colour) -> float:
    low, high = sorted(0.2126 * each[0] + 0.7152 * each[1] + 0.0722 * each[2] for each in (one, other))
    return (high + 0.05) / (low + 0.05)


def oklab(each: Colour) -> tuple[float, float, float]:
    """https://bottosson.github.io/posts/oklab/"""
    red, green, blue = each
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    medium = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def named(sheet: str, name: str) -> list[Colour]:
    """A custom property's two colours, of the light mode and the dark."""
    found = re.search(rf"--{name}: light-dark\((#\w{{6}}), (#\w{{6}})\)", (FOLDER / sheet).read_text(encoding="utf-8"))
    assert found is not None, name
    return [colour(found[1]), colour(found[2])]


@pytest.fixture(params=[0, 1], ids=["light", "dark"])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    return request.param


def test_hues_stand_out_from_the_page(mode: int) -> None:
    for surface in ("page", "card"):
        background = named("console.css", surface)[mode]
        for i in range(8):
            assert contrast(named("gates.css", f"hue-{i}")[mode], background) >= 3
        for text in ("text", "quiet", "accent", "good", "bad"):
            assert contrast(named("console.css", text)[mode], background) >= 4.5


def test_hues_can_be_told_apart_by_the_colour_blind(mode: int) -> None:
    hues = [named("gates.css", f"hue-{i}")[mode] for i in range(8)]
    for vision in VISIONS:
        for (i, one), (j, other) in itertools.combinations(enumerate(hues), 2):
            apart = 100 * math.dist(oklab(seen(one, vision)), oklab(seen(other, vision)))
            assert apart >= (10 if max(i, j) < 4 else 6), (vision, i, j, apart)
