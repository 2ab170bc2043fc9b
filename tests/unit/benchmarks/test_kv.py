"""What the KV benchmark counts, without an engine."""

from __future__ import annotations

import math

from benchmarks.kv import PAGE, Contiguous, Paged, Peak, Shared, tables
from benchmarks.sessions import Burst, Session
from xloom.protocol import EngineStats, TokenRequest


def session(prompt: int, made: int, *, first: bool = True, done: bool = False) -> Session:
    request = TokenRequest("r", [1] * prompt, {})
    return Session(request, 0.0, 1.0 if first else None, "length" if done else None, made)


def test_only_running_sessions_hold_tokens() -> None:
    assert session(10, 5).held == 15
    assert session(10, 0, first=False).held == 0
    assert session(10, 5, done=True).held == 0


def test_the_peak_is_the_step_with_most_sessions() -> None:
    peak = Peak()
    peak.take([session(10, 1)], EngineStats(1, 0, 3, 10))
    peak.take([session(10, 2), session(20, 1), session(5, 0, first=False)], EngineStats(2, 1, 5, 10))
    peak.take([session(10, 9, done=True), session(20, 30)], EngineStats(1, 0, 9, 10))
    assert (peak.sessions, peak.tokens, peak.pages, peak.most_pages) == (2, 33, 5, 9)
    assert peak.samples == [0.5]


def test_a_preempted_session_does_not_count_as_running() -> None:
    peak = Peak()
    peak.take([session(10, 1), session(10, 1), session(10, 1)], EngineStats(2, 1, 3, 10))
    assert peak.sessions == 0


def test_a_burst_is_judged_by_what_it_made() -> None:
    burst = Burst([session(4, 8, done=True), session(4, 2)], 2.0)
    assert (burst.tokens_per_second, burst.complete) == (5.0, 1)
    assert burst.median_first_token_ms == 1000.0


def test_the_tables_put_both_beside_each_other() -> None:
    burst = Burst([session(100, 64, done=True) for _ in range(8)], 4.0)
    peak = Peak(sessions=20, tokens=20 * 150, pages=math.ceil(150 / PAGE) * 20, most_pages=100, samples=[0.9, 1.0])
    paged = Paged(peak, 100, 1, burst, Shared(100, 29.0, 30.0))
    cached = Paged(peak, 100, 0, burst, Shared(40, 10.0, 40.0))
    found = tables(64 * 2**20, paged, cached, Contiguous(4, 600, 40 * 2**20), burst, 0)
    sessions, used, wasted = found[0]["rows"][0], found[0]["rows"][2], found[0]["rows"][3]
    assert sessions[1:] == [4, 20, "5.0×"]
    assert used[1:3] == ["7%", "94%"]
    assert wasted[1:3] == ["93%", "6%"]
    assert found[1]["rows"][0][1:] == [100, 40, "0.40"]
    assert found[1]["rows"][1][1:] == ["40.0", "10.0", "0.25"]
    assert found[2]["rows"][0][:2] == [8, 8]
