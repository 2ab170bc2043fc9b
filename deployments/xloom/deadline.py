"""A limit on what is asked of another process, and the error that says who did not answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from xloom.protocol import XloomError


@contextlib.asynccontextmanager
async def limited(seconds: float, who: str, what: str) -> AsyncIterator[None]:
    """Give up after so many seconds. Raises `XloomError` (no_answer), naming who was asked and for what."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():  # another one's
            raise
        raise no_answer(seconds, who, what) from None


def no_answer(seconds: float, who: str, what: str) -> XloomError:
    """The error of one that did not answer in time."""
    return XloomError(
        "no_answer",
        f"{who} did not answer within {seconds:g} s: {what}.",
        "One that is stuck is restarted; see `xloom status` and its log.",
        504,
    )
