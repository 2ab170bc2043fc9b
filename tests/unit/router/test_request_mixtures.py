"""Which adapter a request with weights is served with, and what is refused before anything is made."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from xloom.adapters.manifest import Entry, Manifest
from xloom.adapters.request_mixtures import request_mixture_name
from xloom.protocol import XloomError
from xloom.router import request_mixtures
from xloom.router.manifest_watch import ManifestWatch
from xloom.router.request_mixtures import RequestMixtures, WeightedRequests
from xloom.router.weights import Sent, adapter_in_place, take_weights
from xloom.settings import RequestMixtureSettings

ENTRIES = (
    Entry("code", "lora", "g1", 8, (), 1, "./code"),
    Entry("docs", "lora", "g2", 8, (), 1, "./docs"),
    Entry("arrow", "arrow", "g3", 16, (), 1, "", adapters=("code", "docs")),
    Entry("fixed", "fixed", "g4", 16, (), 1, "", adapters=("code", "docs")),
)


class Store:
    """Takes its time to make a stack, and remembers what it was asked."""

    def __init__(self) -> None:
        self.manifest = Manifest(1, ENTRIES)
        self.gathered: list[dict[str, str]] = []
        self.kept: list[list[str]] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.refusal: XloomError | None = None

    async def gather(self, parts: Mapping[str, str], max_rank: int, most: int) -> Entry:
        self.gathered.append(dict(parts))
        await self.may_go_on.wait()
        entry = Entry(request_mixture_name(parts), "fixed", "g9", 16, (), 1, "", parts=dict(parts))
        self.manifest = self.manifest.with_entry(entry)
        return entry

    async def await_held(self, name: str, generation: str, timeout_s: float) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def keep(self, names: Sequence[str], idle_s: float) -> None:
        self.kept.append(list(names))


class Watch:
    """The router's copy, always up to date."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self._store.manifest.named

    @property
    def of_requests(self) -> tuple[Entry, ...]:
        return tuple(self._store.manifest.of_requests.values())

    def entry(self, name: str) -> Entry | None:
        return self._store.manifest.get(name)


def made(store: Store, *, mixtures: bool = True, wait_s: float = 5) -> RequestMixtures:
    watch = cast(ManifestWatch, Watch(store))
    limits = RequestMixtureSettings(wait_s=wait_s)
    return RequestMixtures("base", watch, store, limits, max_rank=64, mixtures=mixtures)


async def test_a_set_is_made_once_and_its_weights_and_order_do_not_matter() -> None:
    store = Store()
    mixtures = made(store)
    refs = [
        await mixtures.adapter_for(Sent(model, weights))
        for model in ("base", None)
        for weights in ({"code": 0.5, "docs": -2.0}, {"docs": 1.0, "code": 0.0})
    ]
    assert len(set(refs)) == 1
    assert refs[0] is not None
    assert refs[0].of_requests
    assert store.gathered == [{"code": "g1", "docs": "g2"}]


async def test_a_mixtures_own_stack_is_used_on_its_name_and_a_fixed_one_as_it_is() -> None:
    store = Store()
    assert await made(store).adapter_for(Sent("fixed", {"code": 1.0})) is None
    ref = await made(store).adapter_for(Sent("arrow", {"code": 1.0}))
    assert ref is not None
    assert ref.kind == "fixed"
    assert store.gathered == [{"arrow": "g3"}]
    assert await made(store).adapter_for(Sent("nobody", {"code": 1.0})) is None  # the front end says so


@pytest.mark.parametrize(
    ("model", "weights", "said"),
    [
        ("base", {}, "empty"),
        ("base", {"poems": 1.0}, "Adapters are: code, docs"),
        ("base", {"arrow": 1.0}, "Mixtures can't be mixed"),
        ("base", {"code": float("nan")}, "nan"),
        ("base", {"code": float("inf")}, "inf"),
        ("base", {"code": 101.0}, "-100 to 100"),
        ("base", {f"a{number}": 1.0 for number in range(33)}, "33 adapters"),
        ("code", {"code": 1.0}, "takes none"),
        ("arrow", {"poems": 1.0}, "code, docs"),
        ("fixed", {"poems": 1.0}, "code, docs"),
        ("arrow", {"code": float("nan")}, "nan"),
    ],
)
async def test_what_makes_no_sense_is_refused_before_the_store_is_asked(
    model: str, weights: dict[str, float], said: str
) -> None:
    store = Store()
    with pytest.raises(XloomError, match=said) as failure:
        await made(store).adapter_for(Sent(model, weights))
    assert (failure.value.code, failure.value.status) == ("invalid_weights", 400)
    assert store.gathered == []


async def test_engines_that_are_not_ready_for_mixtures_are_not_asked_for_one() -> None:
    with pytest.raises(XloomError, match=r"engine\.enable_xlora") as failure:
        await made(Store(), mixtures=False).adapter_for(Sent("base", {"code": 1.0}))
    assert failure.value.code == "unsupported_by_backend"


async def test_the_first_request_waits_no_longer_than_it_may() -> None:
    store = Store()
    store.may_go_on.clear()
    with pytest.raises(XloomError, match="putting code, docs together") as failure:
        await made(store, wait_s=0.05).adapter_for(Sent("base", {"code": 1.0, "docs": 1.0}))
    assert (failure.value.code, failure.value.status) == ("no_answer", 504)


async def test_what_an_engine_refuses_is_said() -> None:
    store = Store()
    store.refusal = XloomError("adapter_load_failed", "no room", status=500)
    mixtures = made(store)
    with pytest.raises(XloomError, match="no room"):
        await mixtures.adapter_for(Sent("base", {"code": 1.0}))
    store.refusal = None
    assert await mixtures.adapter_for(Sent("base", {"code": 1.0})) is not None


async def test_the_store_is_told_what_is_in_use_for_as_long_as_an_answer_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_mixtures, "KEEP_S", 0.01)
    store = Store()
    mixtures = made(store)
    mixtures.start()
    begun, done = asyncio.Event(), asyncio.Event()
    served: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        served.append(adapter_in_place())
        begun.set()
        await done.wait()

    take_weights({"model": "base", "mixture": {"code": 0.5}})
    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    answering = asyncio.create_task(WeightedRequests(app, mixtures)(scope, cast(Any, None), cast(Any, None)))
    await asyncio.wait_for(begun.wait(), 5)
    name = store.manifest.of_requests.popitem()[0]
    assert served[0].name == name
    async with asyncio.timeout(5):
        while len(store.kept) < 5:
            await asyncio.sleep(0.005)
        done.set()
        await answering
        while store.kept[-1] != []:  # it is there, and nobody uses it any more
            await asyncio.sleep(0.005)
    assert store.kept[0] == store.kept[4] == [name]
    await mixtures.close()


async def test_routes_that_answer_nothing_are_left_alone() -> None:
    store = Store()
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert adapter_in_place() is None
        passed.append(scope["path"])

    take_weights({"model": "base", "mixture": {"poems": 0.5}})
    for path in ("/tokenize", "/v1/models"):
        scope = {"type": "http", "method": "POST", "path": path}
        await WeightedRequests(app, made(store))(scope, cast(Any, None), cast(Any, None))
    assert passed == ["/tokenize", "/v1/models"]
