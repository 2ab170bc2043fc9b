"""The Serving board: what clients see. Traffic, latency, tokens, errors, and how full the deployment is."""

from __future__ import annotations

from xloom.observability import table
from xloom.observability.table import Metric
from xloom_dashboards import upstream
from xloom_dashboards.board import SCOPE, Board, Row
from xloom_dashboards.failures import failed_share, server_error_share
from xloom_dashboards.panel import Bars, Graph, Heatmap, Panel, Query, Stat
from xloom_dashboards.promql import or_nothing, or_zero, share, total
from xloom_dashboards.shared import MARKS, MODEL, PAGES_FULL, PLACE, TOKENS_A_SECOND

OF_MODEL = 'model=~"$model"'
A_DAY = "1d"
_QUANTILES = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))


def _rate(metric: Metric, *matchers: str, by: tuple[str, ...] = ()) -> str:
    return SCOPE.rate(metric, OF_MODEL, *matchers, by=by)


_ENDED = _rate(table.REQUESTS)


def _of_a_day(metric: Metric) -> str:
    return total(f"increase({SCOPE.series(metric, OF_MODEL)}[{A_DAY}])", ("model",))


_NOW = Row("Now", (
    Stat(
        title="Requests", text="Requests that end each second.",
        queries=(Query(or_zero(_ENDED)),), unit="reqps",
    ),
    Stat(
        title="Failed requests", unit="percentunit", steps=((0.01, "orange"), (0.05, "red")),
        text="Requests that ended with an error, as a share of all. Red is where XloomRequestsFailing fires.",
        queries=(Query(or_nothing(failed_share(SCOPE, OF_MODEL))),),
    ),
    Stat(
        title="Time to first token, p99", unit="s", steps=((5, "orange"), (10, "red")),
        text="99 of 100 requests had their first token within this time. Red is where XloomFirstTokenSlow fires.",
        queries=(Query(SCOPE.quantile(0.99, table.TIME_TO_FIRST_TOKEN, OF_MODEL)),), none="No requests",
    ),
    Stat(
        title="Tokens out", unit=TOKENS_A_SECOND, text="Tokens sent to clients each second.",
        queries=(Query(or_zero(_rate(table.GENERATION_TOKENS))),),
    ),
    Stat(
        title="Requests in flight", text="Requests the routers have taken and not yet answered in full.",
        queries=(Query(total(SCOPE.series(table.ROUTER_IN_FLIGHT))),), unit="none", none="No router",
    ),
    Stat(
        title="KV pages in use", unit="percentunit", steps=PAGES_FULL, none="No replica",
        text="Of all replicas together. When no page is free, requests are preempted.",
        queries=(
            Query(share(total(SCOPE.series(table.KV_PAGES_USED)), total(SCOPE.series(table.KV_PAGES_TOTAL)))),
        ),
    ),
))  # fmt: skip

_TRAFFIC = Row("Traffic", (
    Graph(
        title="Requests by model", unit="reqps", stacked=True,
        text="Requests that end each second, by the name the client asked for: the base model, an adapter or a bundle.",
        queries=(Query(_rate(table.REQUESTS, by=("model",)), "{{model}}"),),
    ),
    Graph(
        title="Requests by outcome", unit="reqps", stacked=True,
        text="How requests end: at a stop, at their length, aborted by the client, or with an error.",
        queries=(Query(_rate(table.REQUESTS, by=("outcome",)), "{{outcome}}"),),
    ),
    Graph(
        title="Requests by kind", unit="reqps", stacked=True,
        text="Base model, one adapter (lora), or a mixture of adapters (xlora).",
        queries=(Query(_rate(table.REQUESTS, by=("kind",)), "{{kind}}"),),
    ),
))  # fmt: skip


def _latency(title: str, metric: Metric, text: str, steps: tuple[tuple[float, str], ...] = ()) -> tuple[Panel, ...]:
    """Quantiles, quantiles by model, and the whole histogram of one latency."""
    return (
        Graph(
            title=title, unit="s", text=text, steps=steps,
            queries=tuple(Query(SCOPE.quantile(value, metric, OF_MODEL), name) for value, name in _QUANTILES),
        ),
        Graph(
            title=f"{title}, p90 by model", unit="s",
            text=f"{text} 90 of 100 were below; each model by itself.",
            queries=(Query(SCOPE.quantile(0.9, metric, OF_MODEL, by=("model",)), "{{model}}"),),
        ),
        Heatmap(
            title=f"{title}, distribution", unit="s", text=f"{text} How many fell into each bucket.",
            queries=(Query(SCOPE.buckets(metric, OF_MODEL), "{{le}}"),),
        ),
    )  # fmt: skip


_LATENCY = Row("Latency", (
    *_latency(
        "Time to first token", table.TIME_TO_FIRST_TOKEN,
        "From a request's arrival in the router to its first token: waiting, and computing the prompt.",
        ((10.0, "red"),),
    ),
    *_latency(
        "Between tokens", table.INTER_TOKEN, "Between two steps that brought a request tokens: how fast answers read.",
    ),
    *_latency(
        "Whole request", table.REQUEST_SECONDS, "From a request's arrival to its last token: grows with its length.",
    ),
    *(
        Graph(
            title=title, unit="s", text=text,
            queries=tuple(Query(SCOPE.quantile(value, metric), name) for value, name in _QUANTILES),
        )
        for title, metric, text in (
            (
                "Time in queue", upstream.QUEUE_TIME,
                "From a request's arrival in an engine until the engine took it up. Grows when replicas are too few.",
            ),
            ("Prefill", upstream.PREFILL_TIME, "From there to the first token: grows with prompts and what runs."),
            ("Decode", upstream.DECODE_TIME, "From the first token to the last: grows with answers and what runs."),
        )
    ),
))  # fmt: skip

_TOKENS = Row("Tokens", (
    Graph(
        title="Tokens in, by model", unit=TOKENS_A_SECOND, stacked=True, width=6,
        text="Prompt tokens of requests that begin.",
        queries=(Query(_rate(table.PROMPT_TOKENS, by=("model",)), "{{model}}"),),
    ),
    Graph(
        title="Tokens out, by model", unit=TOKENS_A_SECOND, stacked=True, width=6,
        text="Tokens sent to clients.",
        queries=(Query(_rate(table.GENERATION_TOKENS, by=("model",)), "{{model}}"),),
    ),
    Graph(
        title="Prompt tokens from the prefix cache", unit="percentunit", highest=1.0, width=6,
        text="Share of prompt tokens whose KV pages were there already. Each adapter and bundle has pages of its own.",
        queries=(
            Query(
                share(_rate(table.CACHED_TOKENS, by=("model",)), _rate(table.PROMPT_TOKENS, by=("model",))),
                "{{model}}",
            ),
        ),
    ),
    Graph(
        title="Length of prompts and answers, p90", unit="none", width=6,
        text="In tokens, as vLLM's front end counts them: nine of ten are shorter.",
        queries=(
            Query(SCOPE.quantile(0.9, upstream.PROMPT_LENGTH), "prompt"),
            Query(SCOPE.quantile(0.9, upstream.ANSWER_LENGTH), "answer"),
        ),
    ),
    *(
        Bars(
            title=f"Tokens {way} of the last day, by model", unit="short", width=12,
            text=f"{what} of the last 24 hours, by the name the client asked for.",
            queries=(Query(_of_a_day(metric), "{{model}}"),),
        )
        for way, metric, what in (
            ("in", table.PROMPT_TOKENS, "Prompt tokens"), ("out", table.GENERATION_TOKENS, "Tokens sent to clients"),
        )
    ),
))  # fmt: skip

_ERRORS = Row("Errors", (
    Graph(
        title="Errors by code", unit="reqps", stacked=True, width=12,
        text="Answers with an error, by HTTP status and xloom's stable code; docs/errors.md has the cure of each.",
        queries=(Query(SCOPE.rate(table.HTTP_ERRORS, by=("status", "code")), "{{status}} {{code}}"),),
    ),
    Graph(
        title="Failed share", unit="percentunit", width=6, steps=((0.05, "red"),),
        text="Requests that ended with an error, and answers with a 5xx status, as XloomRequestsFailing and "
        "XloomServerErrors reckon them.",
        queries=(
            Query(failed_share(SCOPE, OF_MODEL), "ended with an error"),
            Query(server_error_share(SCOPE), "answered 5xx"),
        ),
    ),
    Graph(
        title="Aborted by clients", unit="percentunit", width=6,
        text="Share of requests whose client went away before the end. Grows when answers are slow.",
        queries=(Query(share(or_zero(_rate(table.REQUESTS, 'outcome="abort"')), _ENDED), "aborted"),),
    ),
))  # fmt: skip

_SATURATION = Row("Saturation", (
    Graph(
        title="Where requests are", unit="none", stacked=True,
        text="Worked on by an engine, waiting in an engine, or waiting in a router for a replica.",
        queries=(
            Query(total(SCOPE.series(table.REPLICA_RUNNING)), "running"),
            Query(total(SCOPE.series(table.REPLICA_WAITING)), "waiting in an engine"),
            Query(total(SCOPE.series(table.ROUTER_WAITING)), "waiting for a replica"),
        ),
    ),
    Bars(
        title="KV pages in use, by replica", unit="percentunit", steps=PAGES_FULL, highest=1.0,
        text="A full replica preempts requests; one full beside empty ones points at placement.",
        queries=(
            Query(
                share(
                    total(SCOPE.series(table.KV_PAGES_USED), ("replica",)),
                    total(SCOPE.series(table.KV_PAGES_TOTAL), ("replica",)),
                ),
                "{{replica}}",
            ),
        ),
    ),
    Graph(
        title="Replayed and preempted", unit="reqps",
        text="Requests that went on at another replica, and requests whose pages were taken for others.",
        queries=(
            Query(or_zero(SCOPE.rate(table.REPLAYS)), "replayed"),
            Query(or_zero(SCOPE.rate(table.PREEMPTIONS)), "preempted"),
        ),
    ),
))  # fmt: skip

SERVING = Board(
    uid="xloom-serving",
    title="xloom / Serving",
    text="What clients see: traffic, latency, tokens and errors, and how full the deployment is.",
    rows=(_NOW, _TRAFFIC, _LATENCY, _TOKENS, _ERRORS, _SATURATION),
    variables=(*PLACE, MODEL),
    marks=MARKS,
)
