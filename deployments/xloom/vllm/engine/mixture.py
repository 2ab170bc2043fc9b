"""X-LoRA's figures from vLLM's worker processes, asked for while there are X-LoRA requests and no longer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from xloom.protocol import AdapterRef, MixtureFigures

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.core_client import AsyncMPClient


class MixtureReader:
    """Asks one engine core.

    The call is answered between two steps. With several ranks it is sent to all of them, behind the steps under way,
    which on a GPU costs at most a step's head start each time.
    """

    def __init__(self, core: AsyncMPClient) -> None:
        self._core = core
        self._running: set[str] = set()
        self._begun = 0  # X-LoRA requests
        self._settled = 0  # of them, those whose figures have all been read

    def began(self, request_id: str, adapter: AdapterRef) -> None:
        """A request was submitted."""
        if adapter.kind == "xlora":
            self._running.add(request_id)
            self._begun += 1

    def ended(self, request_ids: Iterable[str]) -> None:
        """Requests were aborted."""
        self._running.difference_update(request_ids)

    def saw(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """A step's outputs."""
        if self._running:
            self.ended(output.request_id for output in outputs if output.finish_reason is not None)

    async def growth(self) -> MixtureFigures | None:
        """The figures since last asked; None for nothing."""
        begun, idle = self._begun, not self._running
        if idle and begun == self._settled:
            return None
        # Relied on: the worker method named here is found through `worker_extension_cls`; vLLM 0.32. No time limit:
        # one that struck would leave the multiprocess executor with answers to a call it has given up.
        answers = await self._core.collective_rpc_async("xloom_mixture")
        found, more = next((answer for answer in answers if answer is not None), (None, False))
        if idle and found is None and not more:
            self._settled = begun
        return None if found is None else msgspec.convert(found, MixtureFigures)
