"""What xloom adds to vLLM's worker processes. Importing it patches the process: `worker_extension_cls` names it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from xloom.vllm.plugin import activate, attachment
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

    def xloom_unapplied(self, folder: str, lora_id: int | None = None) -> list[str] | None:
        """Modules of a prepared adapter that this rank leaves out: before it is loaded, and, with its id, afterwards.

        None where it can't be said. It never raises, as above.
        """
        try:
            # LoRAModelRunnerMixin.lora_manager, WorkerLoRAManager._adapter_manager; vLLM 0.32.
            manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
            if lora_id is None:
                return attachment.unapplied(manager, Path(folder))
            return attachment.unattached(manager, lora_id, Path(folder))
        except Exception:
            logger.exception("the adapter in %s could not be held against the model's linears", folder)
            return None
