"""What xloom adds to vLLM's worker processes. Importing it patches the process: `worker_extension_cls` names it."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from xloom.vllm.plugin import activate
from xloom.vllm.plugin.rank_tally import current_tally

logger = logging.getLogger(__name__)

activate()


class MixtureWorker:
    """Mixed into vLLM's worker class by `ParallelConfig.worker_extension_cls`, for `collective_rpc`; vLLM 0.32."""

    def xloom_mixture(self) -> list[Any] | None:
        """`[MixtureFigures as plain data or None, whether more is to come]`; None from ranks that keep none.

        It never raises: the multiprocess executor stops reading the ranks' answers at the first failure, and would
        take those left over for answers to the next call.
        """
        try:
            tally = current_tally()
            if tally is None:
                return None
            figures, more = tally.take()
            return [msgspec.to_builtins(figures), more]
        except Exception:
            logger.exception("X-LoRA's figures could not be read")
            return None
