"""The page against an endpoint that says what a real one says seldom."""

from __future__ import annotations

import json

import pytest
from fastapi.responses import HTMLResponse, JSONResponse, Response
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser import CHROMIUM, Watched

from .standin import StandIn, stream

pytestmark = CHROMIUM
SEEN_AGAIN = "document.dispatchEvent(new Event('visibilitychange'))"  # it looks at once, and not in seconds
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"


def send(page: Page, text: str = "Who weaves?") -> Locator:
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    answer = page.locator(".answer").last
    expect(answer).not_to_have_attribute("aria-busy", "true")
    return answer


def test_markup_in_an_answer_is_text(page: Page, endpoint: StandIn) -> None:
    tokens = ["a", HOSTILE, "\n", "b"]
    endpoint.answer = stream(tokens, [[0.9, 0.1]] * 4)
    answer = send(page, HOSTILE)
    expect(page.locator(".user").last).to_have_text(HOSTILE)
    assert answer.locator(".token").all_text_contents() == tokens
    answer.get_by_text("Gates as a table").click()
    expect(answer.locator("tbody tr")).to_have_count(4)
    assert page.locator("#conversation img, #conversation script").count() == 0

    endpoint.answer = JSONResponse({"error": {"message": HOSTILE, "code": "odd"}}, 400)
    expect(send(page).locator(".error")).to_have_text(f"{HOSTILE} 400 odd")
    assert page.locator("#conversation img, #conversation script").count() == 0


def test_gates_below_zero_and_of_nobody(page: Page, endpoint: StandIn) -> None:
    endpoint.answer = stream(["one", " two", " three"], [[0.2, -0.8], [0.0, 0.0], [1.5, 0.5]])
    answer = send(page)
    adapters = "tokens => tokens.map(token => token.dataset.adapter ?? null)"
    assert answer.locator(".token").evaluate_all(adapters) == ["docs", None, "code"]
    expect(answer.locator(".legend .value")).to_have_text(["0.57", "−0.10"])
    expect(answer.locator(".strip .zero")).to_have_count(1)
    expect(answer).to_contain_text("9 tokens of the prompt came from the prefix cache, without gates.")


def test_a_stream_that_comes_byte_by_byte(page: Page, endpoint: StandIn) -> None:
    endpoint.answer, endpoint.chunk = stream(["Weber", "é", "n", "</s>"], [[1, 0]] * 4, text="Weberén"), 1
    answer = send(page)
    assert answer.locator(".text").text_content() == "Weberén"
    expect(answer.locator(".token.unseen")).to_have_attribute("data-text", "</s>")


ERROR = json.dumps({"error": {"message": "The replica was lost.", "code": "replica_lost"}})


def test_failures_are_said_plainly(page: Page, endpoint: StandIn) -> None:
    failures: list[tuple[Response | bytes, str]] = [
        (stream(["One"], None, end=f"data: {ERROR}\n\ndata: [DONE]\n\n"), "The replica was lost. replica_lost"),
        (stream(["One"], None, end=""), "The stream broke off before its end. "),
        (HTMLResponse("<h1>Bad gateway</h1>", 502), "The endpoint answered 502. 502"),
        (JSONResponse({"error": {"message": "Too many.", "code": "too_many"}}, 429), "Too many. 429 too_many"),
        (JSONResponse(None, 500), "The endpoint answered 500. 500"),
    ]
    for answer, said in failures:
        endpoint.answer = answer
        shown = send(page)
        expect(shown.locator(".error")).to_have_text(said)
        assert shown.locator(".text").all_text_contents() == (["One"] if isinstance(answer, bytes) else [])
        endpoint.answer = stream(["Two"], None)
        expect(send(page, "Again").locator(".text")).to_have_text("Two")


def test_what_failed_before_its_first_word_is_no_part_of_the_conversation(page: Page, endpoint: StandIn) -> None:
    endpoint.answer = JSONResponse({"error": {"message": "Not now."}}, 503)
    send(page, "One")
    endpoint.answer = stream(["Yes"], None)
    page.get_by_label("System message").fill("Be brief.")
    send(page, "Two")
    assert endpoint.asked[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two"},
    ]


def test_many_adapters_are_added_one_by_one(page: Page, endpoint: StandIn) -> None:
    many = [f"adapter-{i}" for i in range(20)]
    endpoint.models = [{"id": "base", "kind": "base"}, *({"id": name, "kind": "lora"} for name in many)]
    page.reload()
    expect(page.locator("#model option")).to_have_count(21)
    expect(page.get_by_role("slider")).to_have_count(2)
    page.get_by_label("Another adapter").select_option("adapter-17")
    slider = page.get_by_role("slider", name="adapter-17")
    expect(slider).to_be_focused()
    page.keyboard.press("End")
    endpoint.answer = stream(["Yes"], None)
    send(page)
    assert endpoint.asked[-1]["mixture"] == {"adapter-17": 2}


def test_it_works_behind_a_prefix_that_hides_the_status(page: Page, endpoint: StandIn) -> None:
    expect(page.locator("#deployment-note")).to_have_text("Its state is not let through to here.")
    assert page.evaluate("document.querySelector('script').getAttribute('src')") == "console/main.js"


def test_state_is_brought_up_to_date_by_itself(page: Page, endpoint: StandIn) -> None:
    stats = {"running": 3, "waiting": 7, "kv_pages_used": 40, "kv_pages_total": 64, "preemptions": 1, "adapters": []}
    replica = {"id": "replica-1", "node": "n", "address": "", "pid": 1, "state": "ready", "stats": stats}
    endpoint.status = {"replicas": [replica], "adapters": [], "start_failure": "", "router": {"in_flight": 10}}
    page.evaluate(SEEN_AGAIN)
    card = page.get_by_role("article", name="Replica replica-1")
    expect(card.locator("dd")).to_have_text(["3", "7", "1", "0", "40 of 64"])
    endpoint.status = {"replicas": [], "adapters": [], "start_failure": "No memory.", "router": {"in_flight": 0}}
    page.evaluate(SEEN_AGAIN)
    expect(page.locator("#deployment-note")).to_have_text("No replica: No memory.")
    expect(page.locator("#connection")).to_have_text("No replica is ready")


@pytest.mark.parametrize("width", [390, 1400])
def test_a_long_answer_is_followed_and_its_gates_stay_beside_it(page: Page, endpoint: StandIn, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    endpoint.answer = stream(["word\n"] * 120, [[0.4, 0.6]] * 120)
    answer = send(page)
    composer = page.locator("#composer").bounding_box()
    shown = answer.bounding_box()
    assert composer is not None
    assert shown is not None
    assert shown["height"] > 2000
    assert abs(shown["y"] + shown["height"] - composer["y"]) < 40
    answer.locator(".token").nth(40).hover()
    expect(answer.locator(".readout-title")).to_contain_text("Token 41 of 120")
    readout = answer.locator(".readout").bounding_box()
    assert readout is not None
    assert 0 < readout["y"] < readout["y"] + readout["height"] <= composer["y"] + 1


def test_nothing_hangs_out_of_the_page(browser: Browser, endpoint: StandIn) -> None:
    endpoint.answer = stream(["a" * 300, " b"] * 30, [[0.4, 0.6]] * 60)
    watched = Watched(browser, reduced_motion="reduce")
    page = watched.page
    page.goto(f"{endpoint.url}/console")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    answer = send(page, "x" * 400)
    for width in (320, 390, 800, 1024, 1400):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    backgrounds = []
    for mode in ("light", "dark"):
        page.emulate_media(color_scheme=mode, reduced_motion="reduce")
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(244, 245, 248)", "rgb(21, 24, 30)"]
    moving = "bars => bars.map(bar => getComputedStyle(bar).transitionDuration)"
    assert set(answer.locator(".bar rect").evaluate_all(moving)) == {"0s"}
    watched.close(endpoint.url)
