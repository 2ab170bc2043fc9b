"""The messages between router and replica, and the errors every part of xloom raises.

Frames are msgpack. A router opens one connection to each replica, on which both first prove that they know the
deployment's token (`wire/greeting.py`); then submissions and aborts go one way, and one `Step` for each engine step the
other way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

MIXTURES = ("xlora", "arrow", "fixed", "linear")  # kinds of mixture: where their gates come from
INPUT_KINDS = ("arrow", "linear")  # those whose gates come from each linear's own input
KINDS = ("lora", *MIXTURES)  # of what is served beside the base model


class XloomError(Exception):
    """A user's or operator's mistake, or a failure they can act on: a stable code, what happened, the cure.

    `status` is the HTTP status it has at the endpoint.
    """

    def __init__(self, code: str, message: str, cure: str = "", status: int = 400) -> None:
        super().__init__(code, message, cure, status)
        self.code, self.message, self.cure, self.status = code, message, cure, status

    def __str__(self) -> str:
        return f"{self.message} {self.cure}".strip() + f" [{self.code}]"


def some_of(names: Sequence[str], shown: int = 8) -> str:
    """Names for a message: the first of many."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def adapter_key(name: str, generation: str) -> str:
    """`name@generation`: an adapter at one generation as text, in reports, logs and vLLM's own names for it."""
    return f"{name}@{generation}"


def split_adapter_key(key: str) -> tuple[str, str]:
    """The name and the generation in an `adapter_key`; text without a generation is a name, with ""."""
    name, separator, generation = key.rpartition("@")
    return (name, generation) if separator else (key, "")


def adapter_number(key: str) -> int:
    """The positive 31-bit number that any process derives alike from an `adapter_key`; two keys may share one."""
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") & 0x7FFFFFFF) or 1


REQUESTS = "+"  # what names of the mixtures that requests ask for begin with, as no other's do


class AdapterRef(msgspec.Struct, frozen=True):
    """What a request is served with: an adapter or bundle at one generation (its content hash)."""

    name: str
    generation: str  # hex digest of the prepared content, overrides included
    kind: str  # "lora", or a mixture's routing: "xlora", "arrow", "fixed", "linear"

    @property
    def is_mixture(self) -> bool:
        """Whether it has gates."""
        return self.kind in MIXTURES

    @property
    def of_requests(self) -> bool:
        """Whether requests asked for it by their weights alone: nobody names it."""
        return self.name.startswith(REQUESTS)

    @property
    def label(self) -> str:
        """What metrics call it: those of requests come and go, and have one name."""
        return f"{REQUESTS}requests" if self.of_requests else self.name

    @property
    def key(self) -> str:
        """Its `adapter_key`."""
        return adapter_key(self.name, self.generation)


class Overrides(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a deployment sets over a bundle's own routing (`mixtures.options`); None leaves the bundle's."""

    top_k: int | None = None
    temperature: float | None = None
    mixing_mode: str | None = None
    routing_passes: int | None = None
    prefill: str | None = None

    @classmethod
    def of(cls, source: object) -> Overrides:
        """Those of an object with attributes of the same names: settings, or a request's body."""
        return cls(**{name: getattr(source, name) for name in cls.__struct_fields__})


NO_OVERRIDES = Overrides()


def name_of_source(source: str) -> str:
    """What an adapter in a mixture is called that is named by its source: the last part, without a revision."""
    return source.rstrip("/").rpartition("/")[2].partition("@")[0]


class Blend(msgspec.Struct, frozen=True, omit_defaults=True):
    """A mixture made of adapters alone: which they are, and where its gates come from."""

    routing: str  # arrow or fixed
    adapters: dict[str, str]  # name in the mixture -> source
    weights: dict[str, float] = {}  # of fixed; empty: alike, and together 1
    top_k: int | None = None  # of arrow; None: all
    temperature: float | None = None  # of arrow; None: 1
    subtract: dict[str, str] = {}  # of arrow: adapters whose mean is taken from each of those mixed; name -> source
    generations: dict[str, str] = {}  # of adapters that are the store's own, by name: read there, not at the source

    @property
    def sources(self) -> dict[str, str]:
        """Name -> source of all adapters that are read."""
        return self.adapters | self.subtract


class TokenRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One generation request, in tokens."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: dict[str, Any]  # vLLM SamplingParams field names, defaults left out
    adapter: AdapterRef | None = None  # None: the base model
    priority: int = 0
    arrival_time: float = 0.0  # seconds since the epoch
    cache_salt: str | None = None
    client_id: str = ""  # the X-Request-Id of the HTTP request it belongs to
    trace: dict[str, str] = {}  # the trace it belongs to: traceparent, tracestate
    extra: dict[str, Any] = {}  # engine-specific fields, passed through
    num_client_tokens: int | None = None  # of the prompt; those after them another replica has generated. None: all
    weights: dict[str, float] | None = None  # of a mixture with fixed gates, by adapter. None: the mixture's own
    layer_gates: bool = False  # of a mixture: whether the gates of each layer are wanted


class Logprobs(msgspec.Struct, array_like=True, omit_defaults=True):
    """Log-probabilities of some tokens: `[num_tokens, num_candidates]`, the sampled token first."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]  # rank of the sampled token, from 1

    def part(self, start: int, end: int) -> Logprobs:
        """The rows from one token to another."""
        return Logprobs(self.token_ids[start:end], self.logprobs[start:end], self.ranks[start:end])

    def extend(self, more: Logprobs) -> None:
        """Rows after these."""
        self.token_ids += more.token_ids
        self.logprobs += more.logprobs
        self.ranks += more.ranks


class Gates(msgspec.Struct, array_like=True, omit_defaults=True):
    """The gates of a chunk's tokens, of K adapters: those of the rows that the tokens were sampled from.

    float32, little-endian.
    """

    tokens: bytes  # [num_tokens, K], means over linears
    layers: bytes = b""  # [num_tokens, num_layers, K], where asked for; NaN for a layer without linears
    # On the first chunk alone:
    prompt: bytes = b""  # [K], the mean over the prompt's rows; its last token's is the first of the chunk's own
    prompt_tokens: int = 0  # how many rows that is: not those that the prefix cache had
    adapters: list[str] = []  # names, in their order


class TokenChunk(msgspec.Struct, array_like=True, omit_defaults=True):
    """The new tokens of one request in one engine step."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None  # stop, length, abort, error, repetition
    stop_reason: int | str | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache; set on the first chunk
    queued_us: int = 0  # microseconds the request waited in the engine; set on the first chunk
    preemptions: int = 0  # times its pages were taken since its last chunk
    gates: Gates | None = None  # of a mixture


class EngineStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an engine reports: requests and KV pages in use now."""

    running: int = 0
    waiting: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    preemptions: int = 0  # since the engine started
    adapters: list[str] = []  # resident, each as its `adapter_key`

    @property
    def kv_occupancy(self) -> float:
        """Share of KV pages in use, 0 to 1."""
        return self.kv_pages_used / self.kv_pages_total if self.kv_pages_total else 0.0


class BundleFigures(msgspec.Struct, frozen=True):
    """What became of one bundle's tokens: sums over those routed, means over the adapted modules."""

    name: str
    tokens: int  # as scheduled: a token computed again, after a preemption say, counts again
    gates: dict[str, float]  # by adapter; by size, should they be negative
    entropy: float  # nats; of the gates as shares of their sum


class MixtureFigures(msgspec.Struct, frozen=True):
    """What an engine did for X-LoRA in some time. A bundle may be there twice, at two generations."""

    bundles: list[BundleFigures]
    steps: int  # engine steps with X-LoRA tokens
    seconds: float  # of those steps, in the model
    scaling_seconds: float  # of them, in scaling
    routing_seconds: float  # of them, in classifier and gates


# Router to replica.


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first frame of a connection. Later versions may add fields, and change the rest of the protocol."""

    protocol: str  # `wire.greeting.PROTOCOL`
    router_id: str
    nonce: bytes


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    """That the router knows the token."""

    proof: bytes


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request_id: str  # what the request is called here
    body: bytes  # a `TokenRequest` (`wire.requests`), opaque here: one that can't be read fails alone


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: list[str]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """The router is there."""


# Replica to router.


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """The answer to `Hello`: that the replica knows the token, and what the router has to prove."""

    replica_id: str
    nonce: bytes
    proof: bytes


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The answer to a `Hello` of another version."""

    protocol: str  # the replica's own


class Step(msgspec.Struct, frozen=True, tag="step"):
    """The chunks of one engine step for all requests of one router."""

    chunks: list[TokenChunk]


class Rows(msgspec.Struct, frozen=True, tag="rows"):
    """Log-probabilities of a chunk that is too large for one frame; the chunk follows, and the rest of them."""

    request_id: str
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


class RequestFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The replica refuses or gave up one request; the others go on."""

    request_id: str
    code: str
    message: str
    cure: str = ""
    status: int = 500
    retryable: bool = False  # True: another replica may take it


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Periodic state of the replica, for placement."""

    stats: EngineStats
    draining: bool = False


RouterFrame = Submit | Abort | Ping
ReplicaFrame = Step | Rows | RequestFailed | Report
