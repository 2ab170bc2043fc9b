"""When a silent peer counts as stopped."""

from __future__ import annotations

from xloom.wire.silence import PATIENCE, SILENCE_S, Silence


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def looks(silence: Silence[str], clock: Clock, seconds: float, speaking: tuple[str, ...] = ()) -> float | None:
    """Seconds until some peer counts as stopped, looking once a second."""
    for second in range(round(seconds)):
        clock.now += 1
        for peer in speaking:
            silence.heard(peer)
        if silence.look():
            return second + 1.0
    return None


def test_one_that_is_silent_while_others_speak_is_stopped_soon() -> None:
    clock = Clock()
    silence: Silence[str] = Silence(clock=clock)
    silence.heard("stopped")
    silence.heard("running")
    found = looks(silence, clock, 60, ("running",))
    assert found is not None
    assert SILENCE_S < found <= SILENCE_S + 1
    assert silence.look() == ["stopped"]


def test_when_all_are_silent_the_machine_may_be_what_is_slow() -> None:
    clock = Clock()
    silence: Silence[str] = Silence(clock=clock)
    silence.heard("one")
    silence.heard("other")
    found = looks(silence, clock, 60)
    assert found is not None
    assert PATIENCE * SILENCE_S < found <= PATIENCE * SILENCE_S + 1


def test_who_slept_itself_has_heard_nothing_and_blames_nobody() -> None:
    clock = Clock()
    silence: Silence[str] = Silence(clock=clock)
    silence.heard("one")
    silence.look()
    clock.now += 3600
    assert silence.look() == []


def test_one_that_left_is_not_watched() -> None:
    clock = Clock()
    silence: Silence[str] = Silence(clock=clock)
    silence.heard("left")
    silence.forget("left")
    assert looks(silence, clock, 60) is None


def test_how_long_is_the_deployments_choice() -> None:
    clock = Clock()
    silence: Silence[str] = Silence(4.0, clock)
    silence.heard("stopped")
    silence.heard("running")
    found = looks(silence, clock, 60, ("running",))
    assert found is not None
    assert 4 < found <= 5
