"""Starts the application on a Ray that is up, and waits until it can answer: `xloom serve`, cluster/deploy.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xloom.app import APP_NAME
from xloom.deadline import no_answer
from xloom.protocol import XloomError
from xloom.router.start_failures import own_error
from xloom.settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application

START_TIMEOUT_S = 900.0
POLL_S = 0.2
DESCRIBE_TIMEOUT_S = 30.0
LOG_LINES = 15  # shown when a start fails with an error that is not ours


def start(
    application: Application,
    settings: Settings,
    *,
    timeout_s: float = START_TIMEOUT_S,
    waiting: Callable[[float], None] = lambda seconds: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Start it and wait until a replica can answer, or until stopped; returns the port the routers listen at.

    `waiting` is told the seconds since the start. With `replicas.min` 0 there is no replica to wait for. Raises
    `XloomError`: start_failed, start_timeout.
    """
    from ray import serve

    began = time.monotonic()
    try:
        serve.run(application, name=APP_NAME, route_prefix=None, blocking=False)
    except RuntimeError as error:
        deployments = serve.status().applications[APP_NAME].deployments
        raise start_failed([each.message for each in deployments.values()] or [str(error)]) from None
    router = serve.get_deployment_handle("router", APP_NAME)
    while True:
        try:
            state = router.describe.remote().result(timeout_s=DESCRIBE_TIMEOUT_S)
        except TimeoutError:
            raise no_answer(DESCRIBE_TIMEOUT_S, "The router", "whether a replica is ready") from None
        if state["ready"] or settings.replicas.min == 0 or is_stopped():
            return int(state["port"])
        seconds = time.monotonic() - began
        if seconds > timeout_s:
            cure = "See the replicas' logs, and `serve status` on a cluster."
            raise XloomError("start_timeout", f"No replica was ready within {timeout_s:g} s.", cure, 504)
        waiting(seconds)
        time.sleep(POLL_S)


def start_failed(messages: list[str]) -> XloomError:
    """Serve's account of why a deployment did not start: tracebacks, of which our own error counts, else the end."""
    text = "\n".join(messages)
    lines = [line for line in text.splitlines() if line.strip()]
    said = own_error(text) or "\n".join(lines[-LOG_LINES:])
    return XloomError("start_failed", f"The deployment did not start: {said}", "Mend what it says, start again.", 500)
