"""What several boards have in common: their variables, and the events marked on them."""

from __future__ import annotations

from xloom.observability import table
from xloom_dashboards import upstream
from xloom_dashboards.board import SCOPE, Mark, Variable

SESSION = Variable("session", "Ray session", table.ROUTER_IN_FLIGHT, "SessionName")
CLUSTER = Variable(
    "cluster", "Ray cluster (Kubernetes)", table.ROUTER_IN_FLIGHT, "ray_io_cluster", ('SessionName=~"$session"',)
)
PLACE = (SESSION, CLUSTER)  # what SCOPE narrows to

MODEL = Variable("model", "Model", table.REQUESTS, "model", SCOPE.matchers)
REPLICA = Variable("replica", "Replica", table.REPLICA_RUNNING, "replica", SCOPE.matchers)
BUNDLE = Variable("bundle", "Bundle", table.XLORA_TOKENS, "bundle", SCOPE.matchers)

_VERSION = SCOPE.series(table.STORE_VERSION)
_STATUS = SCOPE.series(upstream.APPLICATION_STATUS)
_CONNECTED = SCOPE.series(table.ROUTER_REPLICAS)

# Each is asked once a minute, and looks one minute back: every change is marked once.
ADAPTERS_CHANGED = Mark(
    "Adapters", "The adapter store has another version",
    f"max({_VERSION}) != max({_VERSION} offset 1m)", "purple", "an adapter is added, replaced or removed",
)  # fmt: skip
DEPLOYING = Mark(
    "Deploy", "Ray Serve is deploying {{application}}",
    f"max by (application) ({_STATUS}) == 5", "blue", "the application is deployed",
)  # fmt: skip
REPLICAS_CHANGED = Mark(
    "Replicas", "Routers know another number of engine replicas",
    f"max({_CONNECTED}) != max({_CONNECTED} offset 1m)", "orange", "an engine replica comes or goes",
)  # fmt: skip
MARKS = (DEPLOYING, REPLICAS_CHANGED, ADAPTERS_CHANGED)

TOKENS_A_SECOND = "suffix: tok/s"
PAGES_FULL = ((0.8, "orange"), (0.95, "red"))  # the second is XloomPagesExhausted's
