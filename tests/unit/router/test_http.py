"""Adding an adapter over HTTP: what becomes of one that an engine refuses."""

from __future__ import annotations

from typing import Any, cast

import pytest
from pydantic import ValidationError

from xloom.adapters.manifest import Entry, Manifest
from xloom.adapters.residency import ReplicaReport
from xloom.adapters.source_rules import SourceRules
from xloom.observability import logs
from xloom.protocol import NO_OVERRIDES, Overrides, XloomError
from xloom.router.http import Control, LoadAdapter, UnloadAdapter

RULES = SourceRules(("hf://",))
OLD = Entry("code", "lora", "old", 8, ("q_proj",), 1, "./old")
NEW = Entry("code", "lora", "new", 8, ("q_proj",), 1, "./new")


class Store:
    """A store in which every add gives `NEW`, and an engine that refuses it with `refusal`."""

    def __init__(self, refusal: str) -> None:
        self.refusal = refusal
        self.reverted: list[tuple[str, str]] = []

    async def add(
        self,
        name: str,
        source: str,
        kind: str | None = None,
        overrides: Overrides = NO_OVERRIDES,
        *,
        replace: bool = False,
        max_rank: int | None = None,
        verify: bool = False,
        mixtures: bool = True,
        rules: SourceRules | None = None,
    ) -> Entry:
        assert rules == RULES
        self.verified = verify
        return NEW

    async def remove(self, name: str) -> Entry | None:
        raise AssertionError(name)

    async def revert(self, name: str, generation: str) -> Entry | None:
        self.reverted.append((name, generation))
        return NEW

    async def await_resident(self, name: str, generation: str, timeout_s: float) -> list[str]:
        raise XloomError(self.refusal, "no", status=500)

    async def await_absent(self, name: str, generation: str, timeout_s: float) -> None:
        raise AssertionError(name)

    async def desired(self, known_version: int, timeout_s: float) -> Manifest:
        raise AssertionError(known_version)

    async def residency(self) -> dict[str, ReplicaReport]:
        return {}


class Watch:
    """The router's copy, from before."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = entries
        self.waited_for: list[tuple[str, str]] = []

    async def wait_gone(self, name: str, generation: str, timeout_s: float) -> None:
        self.waited_for.append((name, generation))


async def refused(store: Store, *served: Entry) -> list[tuple[str, str]]:
    watch = Watch(*served)
    control = Control("base", 64, cast(Any, None), cast(Any, watch), store, RULES)
    with pytest.raises(XloomError) as caught:
        await control.add(LoadAdapter(lora_name="code", lora_path="./new", load_inplace=True))
    assert caught.value.code == store.refusal
    assert watch.waited_for == store.reverted  # and its name is gone by the time of the answer
    return store.reverted


@pytest.mark.parametrize("refusal", ["adapter_load_failed", "adapter_not_verified"])
@pytest.mark.parametrize("served", [(), (OLD,)])
async def test_what_an_engine_refuses_is_taken_back(served: tuple[Entry, ...], refusal: str) -> None:
    assert await refused(Store(refusal), *served) == [("code", "new")]


@pytest.mark.parametrize("verify", [False, True])
async def test_the_store_is_told_what_is_to_be_verified(verify: bool) -> None:
    store = Store("adapter_not_verified")
    control = Control("base", 64, cast(Any, None), cast(Any, Watch()), store, RULES)
    with pytest.raises(XloomError):
        await control.add(LoadAdapter(lora_name="code", lora_path="./new", verify=verify))
    assert store.verified is verify


@pytest.mark.parametrize(("name", "path"), [("sk-123", "./a"), ("a", "/x/sk-123")])
async def test_a_key_does_not_reach_the_store(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_met", {"sk-123"})
    control = Control("base", 64, cast(Any, None), cast(Any, Watch()), cast(Any, None), RULES)
    with pytest.raises(XloomError) as caught:
        await control.add(LoadAdapter(lora_name=name, lora_path=path))
    assert caught.value.code == "invalid_request"
    assert "sk-123" not in str(caught.value)


async def test_what_was_served_before_is_not_taken_back() -> None:
    assert await refused(Store("adapter_load_failed"), NEW) == []


async def test_an_adapter_that_is_only_late_is_not_taken_back() -> None:
    assert await refused(Store("adapter_not_resident"), OLD) == []


def test_a_field_that_vllm_would_ignore_is_ignored_and_a_slip_of_the_pen_is_not() -> None:
    body = {"lora_name": "code", "lora_path": "./new"}
    assert LoadAdapter(**body, base_model_name="base") == LoadAdapter(**body)
    assert UnloadAdapter(lora_name="code", reason="old") == UnloadAdapter(lora_name="code")
    for slip, meant in (("temprature", "temperature"), ("topk", "top_k"), ("load_in_place", "load_inplace")):
        with pytest.raises(ValidationError, match=f"did you mean '{meant}'"):
            LoadAdapter(**body, **{slip: 1})
