"""X-LoRA's figures out of vLLM's worker process: one rank keeps them, and a worker method hands them over."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

# Relied on: the rank that each worker has set up before it makes the model; vllm.distributed, vLLM 0.32.
from vllm.distributed import get_tensor_model_parallel_rank

from xloom.mixtures.tally import MixtureTally

logger = logging.getLogger(__name__)

_tallies: list[MixtureTally] = []  # of this process's model


def tally_of_this_rank(device: str) -> MixtureTally | None:
    """A tally for this process's model. All ranks compute the same gates, so the first alone keeps one."""
    _tallies[:] = [MixtureTally(device)] if get_tensor_model_parallel_rank() == 0 else []
    return _tallies[0] if _tallies else None


class MixtureWorker:
    """Mixed into vLLM's worker class by `ParallelConfig.worker_extension_cls`, for `collective_rpc`; vLLM 0.32."""

    def xloom_mixture(self) -> list[Any] | None:
        """`[MixtureFigures as plain data or None, whether more is to come]`; None from ranks that keep none.

        It never raises: the multiprocess executor stops reading the ranks' answers at the first failure, and would
        take those left over for answers to the next call.
        """
        try:
            if not _tallies:
                return None
            figures, more = _tallies[0].take()
            return [msgspec.to_builtins(figures), more]
        except Exception:
            logger.exception("X-LoRA's figures could not be read")
            return None
