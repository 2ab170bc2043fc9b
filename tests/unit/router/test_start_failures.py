"""Why no replica is there: told to clients and to `xloom status`, as long as none is."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from xloom.commands.status import show_status
from xloom.router import deployment
from xloom.router.dispatch import Dispatcher
from xloom.router.start_failures import said_of

TRACE = """The deployment failed to start 1 times in a row. Retrying. Error:
  File "actor.py", line 41, in __init__
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}

The above exception was the direct cause of the following exception:

xloom.protocol.XloomError: The engine did not start: no weights. Save them. [model_not_loadable]
"""


def test_our_own_error_is_the_cause() -> None:
    assert said_of(TRACE) == "The engine did not start: no weights. Save them. [model_not_loadable]"
    assert said_of("ray.exceptions.RayTaskError\n  File x\nValueError: no kernel\n") == "ValueError: no kernel"
    assert said_of("Waiting for 1 replica to start.") == ""
    assert said_of("") == ""


async def test_a_client_is_told_why_no_replica_is_ready() -> None:
    async def nobody() -> list[object]:
        return []

    dispatcher = Dispatcher(nobody, "token", "router")  # type: ignore[arg-type]
    assert "did not start" not in dispatcher.none_ready("None.", "Wait.").message
    dispatcher.start_failure = said_of(TRACE)
    error = dispatcher.none_ready("None.", "Wait.")
    assert (error.code, error.status) == ("no_replica_ready", 503)
    assert "no weights. Save them. [model_not_loadable]" in error.message


def test_the_status_names_the_cause() -> None:
    class Endpoint:
        url = "http://here"

        def get(self, path: str) -> object:
            return {"model": "base", "replicas": [], "adapters": [], "start_failure": said_of(TRACE)}

    file = io.StringIO()
    show_status(Endpoint(), Console(file=file, width=80), as_json=False)  # type: ignore[arg-type]
    assert "no weights. Save them. [model_not_loadable]" in file.getvalue()


async def test_what_was_told_stays_while_the_controller_has_nothing_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries of Serve its words are empty, and a busy controller answers late: neither is news."""
    said = iter(["no weights", "", "no memory"])

    async def engine_failure() -> str:
        return next(said)

    monkeypatch.setattr(deployment, "engine_failure", engine_failure)
    monkeypatch.setattr(deployment, "FAILURE_PERIOD_S", 0)
    router = SimpleNamespace(_dispatcher=SimpleNamespace(start_failure=""))
    told = []
    for _ in range(3):
        await deployment.Router._ask_why(router)  # type: ignore[arg-type]
        told.append(router._dispatcher.start_failure)
    assert told == ["no weights", "no weights", "no memory"]
