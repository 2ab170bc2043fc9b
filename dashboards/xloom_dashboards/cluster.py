"""The Cluster board: replicas, what the autoscaler makes of their load, placement, and the nodes below."""

from __future__ import annotations

from xloom.observability import table
from xloom_dashboards import upstream
from xloom_dashboards.board import SCOPE, Board, Row
from xloom_dashboards.panel import Graph, Query, Stat, Table
from xloom_dashboards.promql import aggregate, or_zero, share, total
from xloom_dashboards.shared import MARKS, PAGES_FULL, PLACE, REPLICA

OF_REPLICA = 'replica=~"$replica"'
SCALES = "replicas.max is above replicas.min"
HAS_GPU = "a node has a GPU"
_ENGINE = 'deployment="engine"'


def _by_replica(metric: table.Metric) -> str:
    return total(SCOPE.series(metric, OF_REPLICA), ("replica",))


# By Ray cluster: a new one's routers know no replica until one is up, and clients are at the old one's.
_CONNECTED = f"max({aggregate('min', SCOPE.series(table.ROUTER_REPLICAS), ('SessionName',))})"

_NOW = Row("Now", (
    Stat(
        title="Replicas connected", unit="none", steps=(),
        text="Engine replicas a router is connected to: the fewest that any router knows. While an upgrade has two Ray "
        "clusters running, of the one that has more.",
        queries=(Query(_CONNECTED),), none="No router",
    ),
    Stat(
        title="Replicas wanted", unit="none",
        text="What the autoscaler wants, within replicas.min and replicas.max. Empty where these are the same.",
        queries=(Query(f"max({SCOPE.series(table.SCALING_WANTED)})", event=SCALES),),
    ),
    Stat(
        title="Application", unit="none",
        text="Ray Serve's view of the application.",
        queries=(
            Query(aggregate("max", SCOPE.series(upstream.APPLICATION_STATUS), ("application",)), "{{application}}"),
        ),
        names={
            0: ("unknown", "gray"), 1: ("failed", "red"), 2: ("unhealthy", "red"), 3: ("not started", "gray"),
            4: ("deleting", "orange"), 5: ("deploying", "blue"), 6: ("running", "green"),
        },
    ),
    Stat(
        title="Requests waiting", unit="none", steps=((1, "orange"),),
        text="In engines, and in routers for want of a replica.",
        queries=(
            Query(
                f"{or_zero(total(SCOPE.series(table.REPLICA_WAITING)))} + {total(SCOPE.series(table.ROUTER_WAITING))}"
            ),
        ),
        none="No router",
    ),
    Stat(
        title="KV pages in use", unit="percentunit", steps=PAGES_FULL, none="No replica",
        text="Of all replicas together.",
        queries=(
            Query(share(total(SCOPE.series(table.KV_PAGES_USED)), total(SCOPE.series(table.KV_PAGES_TOTAL)))),
        ),
    ),
    Stat(
        title="Nodes", unit="none", text="Ray nodes that report.",
        queries=(Query(f"count({SCOPE.series(upstream.NODE_CPUS)})"),),
    ),
))  # fmt: skip

_REPLICAS = Row("Replicas", (
    Graph(
        title="Replicas", unit="none", stepped=True,
        text="Engine replicas the autoscaler wants, those Ray Serve finds healthy, and those routers are connected to.",
        queries=(
            Query(f"max({SCOPE.series(table.SCALING_WANTED)})", "wanted", SCALES),
            Query(f"sum({SCOPE.series(upstream.REPLICA_HEALTHY, _ENGINE)})", "healthy"),
            Query(_CONNECTED, "connected"),
        ),
    ),
    Graph(
        title="Failed health checks", unit="none", stacked=True,
        text="Ray Serve's checks of engines and routers that failed; a replica that fails several is replaced.",
        queries=(
            Query(
                total(f"increase({SCOPE.series(upstream.HEALTH_CHECK_FAILURES)}[$__rate_interval])", ("deployment",)),
                "{{deployment}}", "a health check fails",
            ),
        ),
    ),
    Table(
        title="Time to start", unit="ms", value="p90",
        text="From a replica's creation to ready, nine of ten since the controller started: node, weights, compiling.",
        queries=(
            Query(
                SCOPE.quantile_of_all(0.9, upstream.REPLICA_STARTUP_MS, by=("deployment",)), "{{deployment}}",
            ),
        ),
    ),
))  # fmt: skip

_SCALING = Row("Autoscaling", (
    Graph(
        title="Wanted and running", unit="none", stepped=True, width=6,
        text="Replicas the policy wants, and replicas that run. A gap that stays means no node has room.",
        queries=(
            Query(f"max({SCOPE.series(table.SCALING_WANTED)})", "wanted", SCALES),
            Query(f"max({SCOPE.series(table.SCALING_CURRENT)})", "running", SCALES),
        ),
    ),
    Graph(
        title="Pressure", unit="percentunit", steps=((1.0, "red"),), width=6,
        text="Each signal's mean over replicas as a share of its target. Above 100 % replicas are added; "
        "one goes when the rest would stay below 50 %.",
        queries=(Query(aggregate("max", SCOPE.series(table.SCALING_PRESSURE), ("signal",)), "{{signal}}", SCALES),),
    ),
    Graph(
        title="Decisions by reason", unit="none", stacked=True, width=6,
        text="Changes of the number of replicas wanted.",
        queries=(
            Query(
                total(f"increase({SCOPE.series(table.SCALING_DECISIONS)}[$__rate_interval])", ("direction", "reason")),
                "{{direction}}: {{reason}}",
            ),
        ),
    ),
    Table(
        title="All decisions", unit="none", value="Decisions", width=6,
        text="Since the controller started.",
        queries=(Query(total(SCOPE.series(table.SCALING_DECISIONS), ("direction", "reason"))),),
    ),
))  # fmt: skip

_ENGINES = Row("Engines", (
    Graph(
        title="Requests running, by replica", unit="none", stacked=True,
        text="Requests each engine works on at once. Far apart means that placement favours some.",
        queries=(Query(_by_replica(table.REPLICA_RUNNING), "{{replica}}"),),
    ),
    Graph(
        title="Queue depth, by replica", unit="none",
        text="Requests that wait in each engine. replicas.target_queue_depth is what the autoscaler allows.",
        queries=(Query(_by_replica(table.REPLICA_WAITING), "{{replica}}"),),
    ),
    Graph(
        title="KV pages in use, by replica", unit="percentunit", highest=1.0, steps=((0.95, "red"),),
        text="Above 95 % on every replica for ten minutes XloomPagesExhausted fires.",
        queries=(
            Query(share(_by_replica(table.KV_PAGES_USED), _by_replica(table.KV_PAGES_TOTAL)), "{{replica}}"),
        ),
    ),
    Graph(
        title="KV pages", unit="none",
        text="In use and in all, over the replicas chosen.",
        queries=(
            Query(total(SCOPE.series(table.KV_PAGES_USED, OF_REPLICA)), "in use"),
            Query(total(SCOPE.series(table.KV_PAGES_TOTAL, OF_REPLICA)), "in all"),
        ),
    ),
    Graph(
        title="Preemptions, by replica", unit="ops", stacked=True,
        text="Requests whose pages were taken for others: they are computed anew later.",
        queries=(Query(SCOPE.rate(table.PREEMPTIONS, OF_REPLICA, by=("replica",)), "{{replica}}"),),
    ),
    Graph(
        title="Adapters held, by replica", unit="none", stepped=True,
        text="Adapters and bundles in each engine.",
        queries=(Query(_by_replica(table.ADAPTERS_RESIDENT), "{{replica}}"),),
    ),
))  # fmt: skip

_PLACEMENT = Row("Placement", (
    Graph(
        title="Placements, by replica", unit="reqps", stacked=True,
        text="Requests sent to each replica.",
        queries=(Query(SCOPE.rate(table.PLACEMENTS, OF_REPLICA, by=("replica",)), "{{replica}}"),),
    ),
    Graph(
        title="Placed where the adapter is", unit="percentunit", stacked=True, highest=1.0,
        text="Whether the replica held the request's adapter when it was chosen.",
        queries=(
            Query(
                f"{SCOPE.rate(table.PLACEMENTS, OF_REPLICA, by=('resident',))} / on () group_left () "
                f"{SCOPE.rate(table.PLACEMENTS, OF_REPLICA)}",
                "resident: {{resident}}",
            ),
        ),
    ),
    Graph(
        title="Replays by reason", unit="reqps", stacked=True,
        text="Requests that went on at another replica; their clients see one unbroken stream.",
        queries=(Query(SCOPE.rate(table.REPLAYS, by=("reason",)), "{{reason}}"),),
    ),
))  # fmt: skip

_NODES = Row("Nodes", (
    Graph(
        title="CPU", unit="percent", highest=100.0, text="Of each node, as Ray sees it.",
        queries=(
            Query(aggregate("max", SCOPE.series(upstream.NODE_CPU), ("ip", "RayNodeType")), "{{RayNodeType}} {{ip}}"),
        ),
    ),
    Graph(
        title="Memory", unit="percentunit", highest=1.0, steps=((0.95, "red"),),
        text="Of each node. Near 95 % Ray kills workers.",
        queries=(
            Query(
                share(
                    aggregate("max", SCOPE.series(upstream.NODE_MEMORY_USED), ("ip", "RayNodeType")),
                    aggregate("max", SCOPE.series(upstream.NODE_MEMORY), ("ip", "RayNodeType")),
                ),
                "{{RayNodeType}} {{ip}}",
            ),
        ),
    ),
    Graph(
        title="Network", unit="Bps", text="Received and sent by each node.",
        queries=(
            Query(aggregate("max", SCOPE.series(upstream.NODE_RECEIVED), ("ip",)), "received {{ip}}"),
            Query(aggregate("max", SCOPE.series(upstream.NODE_SENT), ("ip",)), "sent {{ip}}"),
        ),
    ),
    Graph(
        title="GPU", unit="percent", highest=100.0, text="How busy each GPU is.",
        queries=(
            Query(
                aggregate("max", SCOPE.series(upstream.GPU_BUSY), ("ip", "GpuIndex")),
                "{{ip}} GPU {{GpuIndex}}", HAS_GPU,
            ),
        ),
    ),
    Graph(
        title="GPU memory", unit="percentunit", highest=1.0,
        text="In use on each GPU. vLLM takes its share at the start.",
        queries=(
            Query(
                share(
                    aggregate("max", SCOPE.series(upstream.GPU_MEMORY_USED), ("ip", "GpuIndex")),
                    "({} + {})".format(
                        aggregate("max", SCOPE.series(upstream.GPU_MEMORY_USED), ("ip", "GpuIndex")),
                        aggregate("max", SCOPE.series(upstream.GPU_MEMORY_FREE), ("ip", "GpuIndex")),
                    ),
                ),
                "{{ip}} GPU {{GpuIndex}}", HAS_GPU,
            ),
        ),
    ),
    Graph(
        title="Disk", unit="percentunit", highest=1.0, steps=((0.9, "red"),),
        text="Of each node; Ray does not measure it in Kubernetes pods.",
        queries=(
            Query(
                share(
                    aggregate("max", SCOPE.series(upstream.NODE_DISK_USED), ("ip",)),
                    "({} + {})".format(
                        aggregate("max", SCOPE.series(upstream.NODE_DISK_USED), ("ip",)),
                        aggregate("max", SCOPE.series(upstream.NODE_DISK_FREE), ("ip",)),
                    ),
                ),
                "{{ip}}",
            ),
        ),
    ),
))  # fmt: skip

CLUSTER_BOARD = Board(
    uid="xloom-cluster",
    title="xloom / Cluster",
    text="Replicas and their load, what the autoscaler decides and why, placement, and the nodes.",
    rows=(_NOW, _REPLICAS, _SCALING, _ENGINES, _PLACEMENT, _NODES),
    variables=(*PLACE, REPLICA),
    marks=MARKS,
)
