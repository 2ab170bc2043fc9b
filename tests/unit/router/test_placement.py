"""Which replica takes a request."""

from __future__ import annotations

from collections import Counter
from typing import Any

from xloom.protocol import EngineStats
from xloom.router.placement import Candidate, choose


def replica(name: str, own: int = 0, at_report: int = 0, **fields: Any) -> Candidate:
    extra = {key: fields.pop(key) for key in ("draining", "has_adapter") if key in fields}
    return Candidate(name, EngineStats(**fields), own, at_report, **extra)


def test_the_least_loaded_takes_it() -> None:
    assert choose([replica("a", running=3), replica("b", running=1), replica("c", running=2)], 0) == "b"


def test_equals_take_turns() -> None:
    chosen = Counter(choose([replica("a"), replica("b"), replica("c")], turn) for turn in range(9))
    assert chosen == {"a": 3, "b": 3, "c": 3}


def test_what_was_sent_since_the_report_counts() -> None:
    stale = replica("a", own=8, at_report=0, running=0)
    assert choose([stale, replica("b", running=2)], 0) == "b"


def test_own_requests_in_the_report_count_once() -> None:
    assert choose([replica("a", own=3, at_report=3, running=3), replica("b", running=4)], 0) == "a"


def test_a_queue_weighs_more_than_running_requests() -> None:
    assert choose([replica("a", running=2, waiting=4), replica("b", running=7)], 0) == "b"


def test_full_pages_send_requests_elsewhere() -> None:
    full = replica("a", running=1, kv_pages_used=95, kv_pages_total=100)
    assert choose([full, replica("b", running=8, kv_pages_used=20, kv_pages_total=100)], 0) == "b"


def test_the_adapter_draws_a_request_until_the_load_is_uneven() -> None:
    elsewhere = replica("a", has_adapter=False)
    assert choose([elsewhere, replica("b", running=2)], 0) == "b"
    assert choose([elsewhere, replica("b", running=20)], 0) == "a"


def test_draining_replicas_take_none() -> None:
    assert choose([replica("a", draining=True), replica("b", running=50)], 0) == "b"
    assert choose([replica("a", draining=True)], 0) is None
    assert choose([], 0) is None
