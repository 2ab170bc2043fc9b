"""The one table of metrics: code, dashboards, alerts and docs take names and units from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

# Bounds of histograms, seconds.
LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
LOAD_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Metric:
    """One metric as Ray's exporter shows it. Counters end in `_total`; units are the last word before that."""

    name: str  # without the exporter's prefix
    kind: Kind
    component: str  # who writes it: router, replica, store, autoscaling
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()  # histograms only
    on_event: str = ""  # what must happen before it has data; empty: plain traffic is enough

    @property
    def exported(self) -> str:
        """The name Prometheus sees; histograms add `_bucket`, `_count` and `_sum`."""
        return f"ray_{self.name}"


# The router: one request each. `model` is the name the client asked for, `kind` is base, lora, or a mixture's routing.
REQUESTS = Metric(
    "xloom_requests_total", "counter", "router",
    "Requests that have ended, by outcome: stop, length, repetition, abort or error; each of n answers is one",
    ("model", "kind", "outcome"),
)  # fmt: skip
PROMPT_TOKENS = Metric(
    "xloom_prompt_tokens_total", "counter", "router",
    "Prompt tokens of requests whose first token came", ("model", "kind"),
)  # fmt: skip
CACHED_TOKENS = Metric(
    "xloom_cached_prompt_tokens_total", "counter", "router",
    "Those of them found in a prefix cache", ("model", "kind"), on_event="prompts begin alike",
)  # fmt: skip
GENERATION_TOKENS = Metric(
    "xloom_generation_tokens_total", "counter", "router", "Tokens sent back to clients", ("model", "kind")
)
TIME_TO_FIRST_TOKEN = Metric(
    "xloom_time_to_first_token_seconds", "histogram", "router",
    "From a request's arrival in the router's engine client to its first token", ("model", "kind"), LATENCY_S,
)  # fmt: skip
INTER_TOKEN = Metric(
    "xloom_inter_token_seconds", "histogram", "router", "Between two steps that brought a request tokens",
    ("model", "kind"), TOKEN_S,
)  # fmt: skip
REQUEST_SECONDS = Metric(
    "xloom_request_seconds", "histogram", "router", "From a request's arrival to its end", ("model", "kind"), LATENCY_S
)
HTTP_ERRORS = Metric(
    "xloom_http_errors_total", "counter", "router",
    "Answers with an error, those to probes apart, by status and stable code", ("status", "code"),
    on_event="a request is refused",
)  # fmt: skip
ROUTER_IN_FLIGHT = Metric("xloom_router_in_flight", "gauge", "router", "Requests in this router")
ROUTER_WAITING = Metric("xloom_router_waiting", "gauge", "router", "Requests in this router that wait for a replica")
ROUTER_REPLICAS = Metric("xloom_router_replicas", "gauge", "router", "Replicas this router is connected to")
PLACEMENTS = Metric(
    "xloom_placements_total", "counter", "router",
    "Requests sent to a replica; resident says whether it held the adapter, yes or no; the base model it always holds",
    ("replica", "resident"),
)  # fmt: skip
REPLAYS = Metric(
    "xloom_replays_total", "counter", "router", "Requests that went on elsewhere, by why: an error code", ("reason",),
    on_event="a replica dies, drains or refuses while it has requests",
)  # fmt: skip

# The replica: one engine each. Ray adds ReplicaId's like by WorkerId; `replica` is Serve's id, as `xloom status` shows.
REPLICA_RUNNING = Metric("xloom_replica_running", "gauge", "replica", "Requests the engine works on", ("replica",))
REPLICA_WAITING = Metric("xloom_replica_waiting", "gauge", "replica", "Requests that wait in the engine", ("replica",))
KV_PAGES_USED = Metric("xloom_replica_kv_pages_used", "gauge", "replica", "KV pages in use", ("replica",))
KV_PAGES_TOTAL = Metric("xloom_replica_kv_pages_total", "gauge", "replica", "KV pages the engine has", ("replica",))
PREEMPTIONS = Metric(
    "xloom_preemptions_total", "counter", "replica", "Requests whose pages were taken for others", ("replica",),
    on_event="the engine runs out of KV pages",
)  # fmt: skip
ADAPTERS_RESIDENT = Metric(
    "xloom_replica_adapters", "gauge", "replica", "Adapters and bundles the engine holds", ("replica",)
)
ADAPTER_SWAPS = Metric(
    "xloom_adapter_swaps_total", "counter", "replica", "Adapters loaded into and removed from the engine",
    ("model", "action"),  # action: load, remove, refused
)  # fmt: skip
ADAPTER_LOAD = Metric(
    "xloom_adapter_load_seconds", "histogram", "replica",
    "From a new adapter in the desired state to the engine holding it: fetch and load", ("model",), LOAD_S,
)  # fmt: skip
CACHE_READS = Metric(
    "xloom_node_cache_reads_total", "counter", "replica",
    "Adapters looked up in the node's cache: hit, or miss and fetched from the store", ("outcome",),
)  # fmt: skip

# X-LoRA: sums over tokens, so that replicas add up. Divide by the tokens for a mean.
XLORA_TOKENS = Metric("xloom_xlora_tokens_total", "counter", "replica", "Tokens that were routed", ("bundle",))
XLORA_GATES = Metric(
    "xloom_xlora_gates_total", "counter", "replica",
    "Sum over routed tokens of an adapter's gate, its mean over the modules", ("bundle", "adapter"),
)  # fmt: skip
XLORA_ENTROPY = Metric(
    "xloom_xlora_entropy_nats_total", "counter", "replica",
    "Sum over routed tokens of the gates' entropy, its mean over the modules", ("bundle",),
)  # fmt: skip
XLORA_STEPS_SECONDS = Metric(
    "xloom_xlora_step_seconds_total", "counter", "replica", "Time in the model, in steps with X-LoRA tokens",
    ("replica",),
)  # fmt: skip
XLORA_SCALING_SECONDS = Metric(
    "xloom_xlora_scaling_pass_seconds_total", "counter", "replica",
    "The part of it that scaling took; with vLLM the scaling sequences' share of each step's rows", ("replica",),
)  # fmt: skip
XLORA_ROUTING_SECONDS = Metric(
    "xloom_xlora_routing_seconds_total", "counter", "replica",
    "The part of it that classifier and gates took", ("replica",),
)  # fmt: skip
XLORA_STEPS = Metric("xloom_xlora_steps_total", "counter", "replica", "Engine steps with X-LoRA tokens", ("replica",))

# The adapter store.
STORE_ENTRIES = Metric("xloom_store_entries", "gauge", "store", "Adapters and bundles in the store", ("kind",))
STORE_VERSION = Metric("xloom_store_version", "gauge", "store", "Version of the desired state")
STORE_CHANGES = Metric(
    "xloom_store_changes_total", "counter", "store", "Changes asked of the store, by what became of them",
    ("action", "outcome"),  # action: add, remove, revert; outcome: ok or the error's code
)  # fmt: skip
STORE_FETCHES = Metric(
    "xloom_store_fetches_total", "counter", "store",
    "Fetches by replicas: hit when the object store had the weights, miss when they were read from disk", ("outcome",),
)  # fmt: skip
STORE_FETCHED_BYTES = Metric("xloom_store_fetched_bytes_total", "counter", "store", "Bytes handed to replicas")
STORE_SHARED_BYTES = Metric("xloom_store_shared_bytes", "gauge", "store", "Bytes held in the object store")

# Autoscaling: Serve's controller.
SCALING_DECISIONS = Metric(
    "xloom_autoscaling_decisions_total", "counter", "autoscaling",
    "Decisions that changed the number of replicas wanted, by direction and reason", ("direction", "reason"),
    on_event="load makes replicas come or go",
)  # fmt: skip
SCALING_WANTED = Metric("xloom_autoscaling_wanted_replicas", "gauge", "autoscaling", "Replicas the policy wants")
SCALING_CURRENT = Metric("xloom_autoscaling_replicas", "gauge", "autoscaling", "Replicas that run")
SCALING_PRESSURE = Metric(
    "xloom_autoscaling_pressure_ratio", "gauge", "autoscaling",
    "A signal's mean over replicas as a share of its target: queue or pages", ("signal",),
)  # fmt: skip

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
BY_NAME = {metric.name: metric for metric in METRICS}
