"""Whether the engine applies all of an adapter, as its workers say: else the adapter is refused by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.protocol import AdapterRef, XloomError, some_of

if TYPE_CHECKING:
    from vllm.v1.engine.core_client import AsyncMPClient

logger = logging.getLogger(__name__)


async def check_applied(core: AsyncMPClient, ref: AdapterRef, folder: Path, lora_id: int | None = None) -> None:
    """Ask the workers what they would leave out of a prepared adapter, or, with its id, did leave out of it.

    A module is applied when one rank has it. Raises `XloomError` (not_applied).
    """
    from vllm.platforms import current_platform

    # AsyncMPClient.collective_rpc_async, vLLM 0.32: one answer a rank, of MixtureWorker.xloom_unapplied.
    answers = await core.collective_rpc_async("xloom_unapplied", args=(str(folder), lora_id))
    if not answers or None in answers:
        if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
            # vLLM's plugin for Metal keeps its adapters in its own way.
            logger.warning("which linears of %s the engine adapts is not known", ref.name)
            return
        raise XloomError(
            "not_applied",
            f"The engine can't say which linears of {ref.name!r} it adapts.",
            "See the replica's log.",
        )
    left_out = sorted(set.intersection(*map(set, answers)))
    if left_out:
        raise XloomError(
            "not_applied",
            f"{ref.name!r} adapts {some_of(left_out)}: there vLLM runs no LoRA on this model, and would leave it out.",
            "Adapt the decoder's attention and MLP projections, or set engine.backend to transformers.",
        )
