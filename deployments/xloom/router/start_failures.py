"""Why no replica is there: what Ray Serve says of those that did not start."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0  # for the controller to answer
_OURS = re.compile(r"XloomError: (.*?\[[a-z_]+\])\s*$", re.DOTALL | re.MULTILINE)
_LAST = re.compile(r"^\s*((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*)$", re.MULTILINE)


def own_error(text: str) -> str:
    """The words of the last error of ours in tracebacks, with its code, on one line; "" where there is none."""
    found = _OURS.findall(text)
    return " ".join(found[-1].rpartition("XloomError: ")[2].split()) if found else ""


def said_of(text: str) -> str:
    """Why a deployment did not start, in a line: our own error, else another's last words; "" for no failure."""
    others = _LAST.findall(text)
    return own_error(text) or (others[-1].strip() if others else "")


async def engine_failure() -> str:
    """Why the newest replica did not start, as far as Serve's controller tells; "" when none has failed, or unknown.

    Asked from inside a deployment of the same application. Relied on: `DeploymentStatusOverview.message` carries the
    constructor's traceback (`DeploymentState.record_replica_startup_failure`), Ray 2.60.
    """
    from ray import serve

    def ask() -> Any:
        name = serve.get_replica_context().app_name
        return serve.status().applications[name].deployments["engine"].message

    try:
        async with asyncio.timeout(TIMEOUT_S):
            return said_of(await asyncio.to_thread(ask))
    except Exception as error:  # a controller that restarts, say: no reason to fail for want of a reason
        logger.debug("the controller does not say why no replica is there: %s", error)
        return ""
