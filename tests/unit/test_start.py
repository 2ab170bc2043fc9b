"""Starting the application: the port once a replica can answer, and what is said when none does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xloom.protocol import XloomError
from xloom.settings import Settings, parse_settings
from xloom.start import start, start_failed

TRACE = """The deployment failed to start 3 times in a row. See controller logs for details.
ray::ServeReplica:xloom:engine.initialize_and_get_metadata() (pid=1)
  File "actor.py", line 41, in __init__
xloom.protocol.XloomError: No model could be read from '/nowhere'. Name a local folder. [model_not_loadable]
"""
SETTINGS = Settings()


class Serve:
    """What `start` asks of `ray.serve`: a router that says it is ready at the `ready_at`th time it is asked."""

    def __init__(self, ready_at: int, refusal: str = "") -> None:
        self._ready_at, self._refusal, self.asked = ready_at, refusal, 0

    def run(self, application: Any, **options: Any) -> None:
        if self._refusal:
            raise RuntimeError("Deploying application xloom failed")

    def status(self) -> Any:
        deployments = {"engine": SimpleNamespace(message=self._refusal)}
        return SimpleNamespace(applications={"xloom": SimpleNamespace(deployments=deployments)})

    def get_deployment_handle(self, deployment: str, application: str) -> Any:
        assert (deployment, application) == ("router", "xloom")
        return SimpleNamespace(describe=SimpleNamespace(remote=self._describe))

    def _describe(self) -> Any:
        self.asked += 1
        state = {"ready": self.asked >= self._ready_at, "port": 8123}
        return SimpleNamespace(result=lambda timeout_s: state)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("ray.serve")
    import ray

    def place(ready_at: int, refusal: str = "") -> Serve:
        made = Serve(ready_at, refusal)
        monkeypatch.setattr(ray, "serve", made)
        return made

    monkeypatch.setattr("xloom.start.POLL_S", 0.001)
    return place


def test_it_waits_until_a_replica_can_answer(serve: Any) -> None:
    asked, told = serve(3), []
    assert start(None, SETTINGS, waiting=told.append) == 8123  # type: ignore[arg-type]
    assert asked.asked == 3
    assert len(told) == 2


def test_without_replicas_there_is_nothing_to_wait_for(serve: Any) -> None:
    none = parse_settings({"replicas": {"min": 0}})
    serve(99)
    assert start(None, none) == 8123  # type: ignore[arg-type]


def test_it_stops_waiting_when_told(serve: Any) -> None:
    asked = serve(99)
    assert start(None, SETTINGS, is_stopped=lambda: asked.asked > 1) == 8123  # type: ignore[arg-type]


def test_it_gives_up_in_the_end(serve: Any) -> None:
    serve(10**9)
    with pytest.raises(XloomError) as caught:
        start(None, SETTINGS, timeout_s=0.01)  # type: ignore[arg-type]
    assert caught.value.code == "start_timeout"
    assert "0.01 s" in caught.value.message


def test_a_deployment_that_serve_gives_up_says_why(serve: Any) -> None:
    serve(1, TRACE)
    with pytest.raises(XloomError) as caught:
        start(None, SETTINGS)  # type: ignore[arg-type]
    assert caught.value.code == "start_failed"
    assert "[model_not_loadable]" in caught.value.message


def test_our_own_error_is_shown_without_its_traceback() -> None:
    error = start_failed(["", TRACE])
    assert error.code == "start_failed"
    assert "No model could be read from '/nowhere'" in error.message
    assert "[model_not_loadable]" in error.message
    assert "line 41" not in error.message


def test_anothers_error_is_shown_with_the_end_of_its_traceback() -> None:
    error = start_failed([TRACE.rpartition("xloom.protocol")[0] + "ValueError: no kernel for this\n"])
    assert "line 41" in error.message
    assert error.message.endswith("ValueError: no kernel for this")


def test_an_error_of_several_lines_is_told_whole() -> None:
    said = "vLLM refuses the settings:\nfirst this\nthen that. [invalid_engine_settings]"
    error = start_failed(
        [
            TRACE,
            TRACE.replace("No model could be read from '/nowhere'. Name a local folder. [model_not_loadable]", said),
        ]
    )
    assert error.message.endswith("vLLM refuses the settings: first this then that. [invalid_engine_settings]")
