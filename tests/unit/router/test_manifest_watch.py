"""The router's copy of the desired state, and its look at the replicas: what is late is said to be."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from tests.fakes import FakeStore
from xloom.protocol import XloomError
from xloom.router.deployment import answers
from xloom.router.manifest_watch import ManifestWatch


async def test_the_copy_follows_and_says_what_a_name_stands_for() -> None:
    store = FakeStore()
    watch = ManifestWatch(store, lambda manifest: None)
    await watch.start(10)
    assert watch.ref("code") is None
    old, new = store.put("code", b"1"), store.put("code", b"2")
    await watch.wait_version(store.manifest.version, 10)
    assert watch.ref("code") == new.ref != old.ref
    await watch.close()


async def test_a_change_that_does_not_come_is_said_to_be_missing() -> None:
    store = FakeStore()
    watch = ManifestWatch(store, lambda manifest: None)
    await watch.start(10)
    with pytest.raises(XloomError) as caught:
        await watch.wait_version(99, 0.01)
    assert caught.value.code == "no_answer"
    assert "The adapter store did not answer within 0.01 s" in caught.value.message
    await watch.close()


class Asked:
    """A replica that was asked: it answers, fails, or neither."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def get_async(self) -> Any:
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_a_replica_that_is_stuck_hides_no_other_one() -> None:
    asked = [Asked({"replica_id": "a"}), Asked(None), Asked(OSError("gone")), Asked({"replica_id": "b"})]
    assert await answers(cast(Any, asked), 0.05) == [{"replica_id": "a"}, {"replica_id": "b"}]
    assert await answers([], 0.05) == []
