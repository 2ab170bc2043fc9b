"""The page at /console in a real Chromium, on the server that all tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Request, expect

from tests.browser import CHROMIUM, TIMEOUT_MS, Watched, chromium

from ..served import API_KEY, Served

pytestmark = CHROMIUM
LENGTH = 24
CLEAR = 2e-3  # by how much a gate must be the largest for nobody to doubt it

expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def bare(browser: Browser, server: Served) -> Iterator[Page]:
    """The page as it opens. Whatever a test does there, no request may leave its origin."""
    watched = Watched(browser)
    watched.page.goto(f"{server.url}/console")
    yield watched.page
    watched.close(server.url)


@pytest.fixture
def page(bare: Page) -> Page:
    """The same once it has the key; answers are greedy and short."""
    bare.get_by_label("API key", exact=True).fill(API_KEY)
    bare.get_by_role("button", name="Use the key").click()
    expect(bare.locator("#model option").first).to_be_attached()
    bare.get_by_label("Temperature").fill("0")
    bare.get_by_label("Tokens at most").fill(str(LENGTH))
    return bare


def ask(page: Page, model: str, text: str = "Who weaves?") -> tuple[Locator, dict[str, Any]]:
    """A message to a model, as one types it: the answer's element when it is whole, and the request's body."""
    page.get_by_label("Model, adapter or mixture").select_option(model)
    return send(page, text)


def send(page: Page, text: str) -> tuple[Locator, dict[str, Any]]:
    before = page.locator(".answer").count()
    bodies: list[str] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            bodies.append(request.post_data or "")

    page.on("request", note)
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    answer = page.locator(".answer").nth(before)
    expect(answer).to_be_visible()
    expect(answer).not_to_have_attribute("aria-busy", "true")
    page.remove_listener("request", note)
    (body,) = bodies
    return answer, json.loads(body)


def told(server: Served, body: dict[str, Any]) -> dict[str, Any]:
    """What the API says to the same request, asked for as a whole: the choice."""
    asked = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    answer = server.http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def shown(answer: Locator) -> str:
    """An answer's text as the page has it, without what style sheets add."""
    return "".join(answer.locator(".text").evaluate_all("blocks => blocks.map(block => block.textContent)"))


def assert_coloured(answer: Locator, choice: dict[str, Any]) -> list[str]:
    """Each token is in the colour of its strongest adapter. Returns these adapters."""
    mixture = choice["mixture"]
    tokens = answer.locator(".token")
    assert tokens.count() == mixture["tokens"] == len(choice["logprobs"]["content"])
    of_token = (
        "tokens => tokens.map(token => [token.dataset.adapter ?? null, getComputedStyle(token).borderBottomColor])"
    )
    in_legend = """rows => rows.map(row => [row.querySelector(".adapter").textContent,
        getComputedStyle(row.querySelector(".swatch")).borderBottomColor])"""
    legend = dict(answer.locator(".legend li").evaluate_all(in_legend))
    assert list(legend) == mixture["adapters"]
    assert len(set(legend.values())) == len(legend)
    strongest = []
    for (adapter, colour), gates in zip(tokens.evaluate_all(of_token), mixture["token_gates"], strict=True):
        first, second = sorted(map(abs, gates), reverse=True)[:2]
        if first - second > CLEAR:
            assert adapter == mixture["adapters"][max(range(len(gates)), key=lambda i: abs(gates[i]))]
        assert colour == legend[adapter]
        strongest.append(adapter)
    return strongest


def test_without_the_key_everything_but_the_page_is_refused(bare: Page, server: Served) -> None:
    notice = bare.get_by_role("region", name="This endpoint needs its API key")
    expect(notice.get_by_role("alert")).to_have_text(
        "An API key is needed. Send it as `Authorization: Bearer KEY`. (401 invalid_api_key)"
    )
    expect(bare.locator("#model option")).to_have_count(0)
    expect(bare.get_by_role("button", name="Send")).to_be_disabled()
    body = {"model": "arrow", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1}
    fetched = """async body => (await fetch("v1/chat/completions", {
        method: "POST", body, headers: {"Content-Type": "application/json"} })).status"""
    assert bare.evaluate(fetched, json.dumps(body)) == 401

    bare.get_by_label("API key", exact=True).fill("wrong")
    bare.keyboard.press("Enter")
    expect(notice.get_by_role("alert")).to_contain_text("The key is not valid.")

    bare.get_by_label("API key", exact=True).fill(API_KEY)
    bare.keyboard.press("Enter")
    expect(notice).to_be_hidden()
    expect(bare.locator("#model option")).to_have_count(len(server.names()))
    assert bare.evaluate("[localStorage.length, Object.values(sessionStorage), document.cookie]") == [0, [API_KEY], ""]
    bare.reload()
    expect(bare.locator("#model option").first).to_be_attached()  # a tab keeps it

    bare.get_by_role("button", name="Forget the key").click()
    expect(notice).to_be_visible()
    assert bare.evaluate("Object.keys(sessionStorage)") == []


@pytest.mark.parametrize("model", ["arrow", "blend"])
def test_tokens_are_coloured_as_the_apis_gates_say(page: Page, server: Served, model: str) -> None:
    answer, body = ask(page, model)
    assert body["return_mixture"] == "tokens"
    assert "mixture" not in body
    choice = told(server, body)
    assert shown(answer) == choice["message"]["content"]
    assert_coloured(answer, choice)

    names, gates = choice["mixture"]["adapters"], choice["mixture"]["token_gates"]
    rows = answer.locator(".legend li")

    def assert_read_out(values: list[float]) -> None:
        for name, value in zip(names, values, strict=True):
            read = rows.filter(has=page.get_by_text(name, exact=True)).locator(".value").inner_text()
            assert float(read.replace("−", "-")) == pytest.approx(value, abs=0.0051)

    assert_read_out(list(choice["mixture"]["gates"].values()))
    tokens = answer.locator(".token")
    tokens.nth(2).hover()
    expect(answer.locator(".readout-title")).to_contain_text(f"Token 3 of {len(gates)}")
    assert_read_out(gates[2])
    tokens.nth(2).click()
    for key, at in (("ArrowRight", 3), ("ArrowLeft", 2), ("Home", 0), ("End", len(gates) - 1)):
        page.keyboard.press(key)
        expect(tokens.nth(at)).to_be_focused()
        expect(answer.locator(".readout-title")).to_contain_text(f"Token {at + 1} of {len(gates)}")
        assert_read_out(gates[at])
    assert answer.locator(".strip path").count() == len(names)
    strip = answer.locator(".strip").bounding_box()
    assert strip is not None
    answer.locator(".strip").hover(position={"x": strip["width"] * 4.5 / len(gates), "y": 5})
    expect(tokens.nth(4)).to_contain_class("pointed")
    assert_read_out(gates[4])


def test_sliders_set_the_weights_of_the_request(page: Page, server: Served) -> None:
    page.get_by_label("Model, adapter or mixture").select_option("base")
    alpha = page.get_by_role("slider", name="alpha")
    alpha.focus()
    for _ in range(14):
        page.keyboard.press("ArrowRight")
    page.get_by_label("Weight of beta, as a number").fill("-0.25")
    expect(page.get_by_label("Mix adapters on the base model")).to_be_checked()
    answer, body = send(page, "Who weaves?")
    assert body["mixture"] == {"alpha": 0.7, "beta": -0.25}
    choice = told(server, body)
    assert shown(answer) == choice["message"]["content"]
    assert set(assert_coloured(answer, choice)) == {"alpha"}

    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Weight of beta, as a number").fill("1.5")
    other, body = send(page, "Who weaves?")
    assert body["mixture"] == {"alpha": 0.7, "beta": 1.5}
    choice = told(server, body)
    assert shown(other) == choice["message"]["content"]
    assert set(assert_coloured(other, choice)) == {"beta"}

    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Mix adapters on the base model").uncheck()
    plain, body = send(page, "Who weaves?")
    assert "mixture" not in body
    assert plain.locator(".token").count() == 0


@pytest.mark.parametrize("model", ["base", "alpha"])
def test_an_answer_without_a_mixture_is_plain_text(page: Page, server: Served, model: str) -> None:
    answer, body = ask(page, model)
    assert "return_mixture" not in body
    assert shown(answer) == told(server, body)["message"]["content"]
    assert answer.locator(".token, .gates").count() == 0


def test_a_conversation_goes_on(page: Page, server: Served) -> None:
    first, _ = ask(page, "alpha", "Who weaves?")
    said = shown(first)
    _, body = ask(page, "arrow", "And who spins?")
    assert body["messages"] == [
        {"role": "user", "content": "Who weaves?"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And who spins?"},
    ]


def test_an_answer_can_be_stopped(page: Page, server: Served) -> None:
    page.get_by_label("Model, adapter or mixture").select_option("base")
    page.get_by_label("Tokens at most").fill("8000")
    page.get_by_role("textbox", name="Message", exact=True).fill("Go on")
    page.keyboard.press("Enter")
    answer = page.locator(".answer")
    expect(answer.locator(".text")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(answer).to_contain_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.wait_idle()


def test_what_the_endpoint_refuses_is_said_in_its_words(page: Page) -> None:
    page.get_by_label("Model, adapter or mixture").select_option("weighted")
    page.get_by_label("Weight of alpha, as a number").fill("1000")
    answer, _ = send(page, "Who weaves?")
    expect(answer.locator(".error")).to_contain_text("100")
    expect(answer.locator(".error code")).to_have_text("400 invalid_weights")


def test_the_deployment_is_shown_with_its_queue_and_pages(page: Page, server: Served) -> None:
    (replica,) = server.status()["replicas"]
    card = page.get_by_role("article", name=f"Replica {replica['id']}")
    expect(card).to_contain_text(replica["state"])
    expect(card).to_contain_text(f"of {replica['stats']['kv_pages_total']}")
    for name in server.names():
        if name != "base":
            expect(page.locator(".served .name").get_by_text(name, exact=True)).to_be_visible()


def test_the_page_alone_is_open(server: Served) -> None:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as anyone:
        assert anyone.get("/console").status_code == 200
        assert anyone.get("/console/main.js").status_code == 200
        for path in ("/xloom/status", "/v1/models", "/console/../xloom/status"):
            assert anyone.get(path).status_code == 401
