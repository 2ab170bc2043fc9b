"""The X-LoRA board: how bundles mix their adapters, what routing costs, and adapters' traffic, swaps and loads."""

from __future__ import annotations

from xloom.observability import table
from xloom_dashboards.board import SCOPE, Board, Row
from xloom_dashboards.panel import Bars, Graph, Heatmap, Query, Stat, Table
from xloom_dashboards.promql import or_zero, share, total
from xloom_dashboards.shared import BUNDLE, MARKS, MODEL, PLACE, REPLICA, TOKENS_A_SECOND

OF_BUNDLE = 'bundle=~"$bundle"'
OF_MODEL = 'model=~"$model"'
OF_REPLICA = 'replica=~"$replica"'

_TOKENS = SCOPE.rate(table.XLORA_TOKENS, OF_BUNDLE)
_TOKENS_BY_BUNDLE = SCOPE.rate(table.XLORA_TOKENS, OF_BUNDLE, by=("bundle",))
_ENTROPY_BY_BUNDLE = SCOPE.rate(table.XLORA_ENTROPY, OF_BUNDLE, by=("bundle",))
_MIXTURE = share(SCOPE.rate(table.XLORA_GATES, OF_BUNDLE, by=("bundle", "adapter")), _TOKENS_BY_BUNDLE, ("bundle",))
_ADAPTERS = 'kind=~"lora|xlora"'


def _of_steps(metric: table.Metric, by: tuple[str, ...] = ()) -> str:
    """A time's share of all time in steps with X-LoRA tokens."""
    return share(SCOPE.rate(metric, OF_REPLICA, by=by), SCOPE.rate(table.XLORA_STEPS_SECONDS, OF_REPLICA, by=by))


def _a_step(metric: table.Metric, by: tuple[str, ...] = ()) -> str:
    """A time's mean in seconds a step: both are sums, so the mean is exact."""
    return share(SCOPE.rate(metric, OF_REPLICA, by=by), SCOPE.rate(table.XLORA_STEPS, OF_REPLICA, by=by))


_NOW = Row("Now", (
    Stat(
        title="Tokens routed", unit=TOKENS_A_SECOND, text="Tokens, of prompts and answers, that went through a router.",
        queries=(Query(_TOKENS),),
    ),
    Stat(
        title="Gate entropy", unit="suffix: nats",
        text="Mean over tokens and modules. 0: one adapter alone; the logarithm of their number: all alike.",
        queries=(Query(share(SCOPE.rate(table.XLORA_ENTROPY, OF_BUNDLE), _TOKENS)),),
    ),
    Stat(
        title="Scaling pass", unit="percentunit", steps=((0.6, "orange"),),
        text="What scaling takes of the time of steps with X-LoRA tokens; with vLLM the scaling sequences' share of "
        "the rows. About half is normal when all requests are for bundles, less beside others.",
        queries=(Query(_of_steps(table.XLORA_SCALING_SECONDS)),),
    ),
    Stat(
        title="Routing", unit="percentunit", steps=((0.1, "orange"),),
        text="Share of that time that the classifier and the gates take.",
        queries=(Query(_of_steps(table.XLORA_ROUTING_SECONDS)),),
    ),
    Stat(
        title="X-LoRA requests", unit="percentunit", text="Share of requests that asked for a bundle.",
        queries=(
            Query(
                share(or_zero(SCOPE.rate(table.REQUESTS, 'kind="xlora"')), SCOPE.rate(table.REQUESTS))
            ),
        ),
    ),
    Stat(
        title="Adapters held", unit="none", text="Adapters and bundles in the fullest engine.",
        queries=(Query(f"max({SCOPE.series(table.ADAPTERS_RESIDENT)})"),),
    ),
))  # fmt: skip

_MIXING = Row("Mixture", (
    Graph(
        title="Mixture share", unit="percentunit", stacked=True, width=12, height=10,
        text="Each adapter's mean gate over the tokens routed in this interval, its mean over the modules. With "
        "softmax gates a bundle's adapters add up to 100 %; gated bundles' need not. A bundle that uses one adapter "
        "alone could be that adapter, at half the cost.",
        queries=(Query(_MIXTURE, "{{bundle}}: {{adapter}}"),),
    ),
    Bars(
        title="Mixture share in the time shown", unit="percentunit", width=6, height=10, highest=1.0,
        text="Each adapter's mean gate over all tokens of the time shown.",
        queries=(
            Query(
                share(
                    SCOPE.rate(table.XLORA_GATES, OF_BUNDLE, by=("bundle", "adapter"), window="$__range"),
                    SCOPE.rate(table.XLORA_TOKENS, OF_BUNDLE, by=("bundle",), window="$__range"),
                    ("bundle",),
                ),
                "{{bundle}}: {{adapter}}",
            ),
        ),
    ),
    Graph(
        title="Gate entropy", unit="suffix: nats", width=6, height=10,
        text="Mean over tokens and modules, by bundle. Falls towards 0 when one adapter takes all: a sign of a "
        "collapsed router, or of traffic of one kind.",
        queries=(Query(share(_ENTROPY_BY_BUNDLE, _TOKENS_BY_BUNDLE), "{{bundle}}"),),
    ),
    Graph(
        title="Tokens routed, by bundle", unit=TOKENS_A_SECOND, stacked=True, width=24, height=6,
        text="Tokens, of prompts and answers, that were routed.",
        queries=(Query(_TOKENS_BY_BUNDLE, "{{bundle}}"),),
    ),
))  # fmt: skip

_COST = Row("What routing costs", (
    Graph(
        title="Time of a step", unit="s", stacked=True,
        text="Mean time in the model of a step with X-LoRA tokens: scaling, classifier and gates, and the rest, which "
        "is the forward pass of all other rows.",
        queries=(
            Query(
                f"{_a_step(table.XLORA_STEPS_SECONDS)} - {_a_step(table.XLORA_SCALING_SECONDS)}"
                f" - {_a_step(table.XLORA_ROUTING_SECONDS)}",
                "forward pass",
            ),
            Query(_a_step(table.XLORA_SCALING_SECONDS), "scaling pass"),
            Query(_a_step(table.XLORA_ROUTING_SECONDS), "routing"),
        ),
    ),
    Graph(
        title="Scaling pass, by replica", unit="percentunit", highest=1.0,
        text="Share of step time that scaling takes.",
        queries=(Query(_of_steps(table.XLORA_SCALING_SECONDS, ("replica",)), "{{replica}}"),),
    ),
    Graph(
        title="Routing time a step, by replica", unit="s",
        text="Mean time that classifier and gates take in a step.",
        queries=(Query(_a_step(table.XLORA_ROUTING_SECONDS, ("replica",)), "{{replica}}"),),
    ),
))  # fmt: skip

_TRAFFIC = Row("Adapters and bundles", (
    Graph(
        title="Requests, by adapter", unit="reqps", stacked=True,
        text="Requests that end each second for each adapter and bundle; the base model is left out.",
        queries=(Query(SCOPE.rate(table.REQUESTS, OF_MODEL, _ADAPTERS, by=("model", "kind")), "{{model}} ({{kind}})"),),
    ),
    Graph(
        title="Tokens out, by adapter", unit=TOKENS_A_SECOND, stacked=True,
        text="Tokens sent to clients for each adapter and bundle.",
        queries=(
            Query(
                SCOPE.rate(table.GENERATION_TOKENS, OF_MODEL, _ADAPTERS, by=("model", "kind")), "{{model}} ({{kind}})"
            ),
        ),
    ),
    Graph(
        title="Swaps, by action", unit="ops", stacked=True,
        text="Adapters loaded into engines, removed from them, and refused by them.",
        queries=(Query(SCOPE.rate(table.ADAPTER_SWAPS, OF_MODEL, by=("action",)), "{{action}}"),),
    ),
    Table(
        title="All swaps", unit="none", value="Times",
        text="Loads, removals and refusals of each adapter since the replicas started. Refused: XloomAdapterRefused.",
        queries=(Query(total(SCOPE.series(table.ADAPTER_SWAPS, OF_MODEL), ("model", "action"))),),
    ),
    Bars(
        title="Load time, p90 by adapter", unit="s", steps=((5, "orange"), (30, "red")),
        text="From a new adapter in the desired state to the engine holding it, since the replicas started.",
        queries=(
            Query(SCOPE.quantile_of_all(0.9, table.ADAPTER_LOAD, OF_MODEL, by=("model",)), "{{model}}"),
        ),
    ),
    Heatmap(
        title="Load times", unit="s", scheme="Blues",
        text="How many loads fell into each bucket over time.",
        queries=(
            Query(SCOPE.buckets(table.ADAPTER_LOAD, OF_MODEL), "{{le}}"),
        ),
    ),
))  # fmt: skip

XLORA = Board(
    uid="xloom-xlora",
    title="xloom / X-LoRA",
    text="How bundles mix their adapters, what routing costs, and traffic, swaps and load times of adapters.",
    rows=(_NOW, _MIXING, _COST, _TRAFFIC),
    variables=(*PLACE, BUNDLE, MODEL, REPLICA),
    marks=MARKS,
)
