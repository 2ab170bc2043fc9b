from __future__ import annotations

from xloom.adapters.residency import Refusal, Residency

NO_MEMORY = Refusal("adapter_load_failed", "no memory")


def test_replicas_that_fall_silent_no_longer_count() -> None:
    now = 0.0
    residency = Residency(clock=lambda: now)
    residency.report("a", "node", ["code@1"], {})
    residency.report("b", "node", [], {"code@1": NO_MEMORY})
    assert (residency.holding("code@1"), residency.lacking("code@1")) == (["a"], ["b"])
    assert residency.failures("code@1") == {"b": NO_MEMORY}
    now = 9.0
    residency.report("a", "node", ["code@1"], {})
    now = 10.5
    assert set(residency.live()) == {"a"}
    assert residency.lacking("code@1") == []
    residency.forget("a")
    assert residency.live() == {}
