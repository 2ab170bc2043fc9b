"""The gates of requests' tokens, in the scheduler: they leave with the tokens that they belong to.

Relies on vLLM 0.32: `EngineCoreOutput.kv_transfer_params` goes to the client as it is. KV transfer itself is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request

from xloom.vllm.plugin import GATES
from xloom.vllm.plugin.gate_reports import Told
from xloom.vllm.plugin.pairs import adapters_of, is_scaling


@dataclass
class _Prompt:
    """Of a request without a token so far."""

    adapters: tuple[str, ...]
    total: np.ndarray[Any, Any] | None = None  # [K] float64, the sum over its rows
    rows: int = 0


class GateRecords:
    """What is kept until a request's first token; after it, nothing."""

    def __init__(self) -> None:
        self._prompts: dict[str, _Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def begin(self, request: Request) -> None:
        """A request came."""
        lora = request.lora_request
        if lora is not None and not is_scaling(request.request_id) and (names := adapters_of(lora.lora_path)):
            self._prompts.setdefault(request.request_id, _Prompt(names))

    def drop(self, request_id: str) -> None:
        """It ended."""
        self._prompts.pop(request_id, None)

    def take(self, told: Mapping[str, Told] | None) -> dict[str, list[Any]]:
        """A step's gates, before its outputs are known: what each request's token is sent with, if it has one.

        As the fields of `xloom.protocol.Gates`.
        """
        found = {}
        for request_id, each in (told or {}).items():
            prompt = self._prompts.get(request_id)
            if prompt is not None and each.prompt is not None:
                prompt.total = each.prompt if prompt.total is None else prompt.total + each.prompt
                prompt.rows += each.prompt_tokens
            if each.token is None:
                continue
            fields: list[Any] = [each.token.tobytes()]
            if each.layers is not None or prompt is not None:
                fields.append(b"" if each.layers is None else each.layers.tobytes())
            if prompt is not None:
                mean = b"" if prompt.total is None else (prompt.total / prompt.rows).astype(np.float32).tobytes()
                fields += [mean, prompt.rows, list(prompt.adapters)]
            found[request_id] = fields
        return found

    def attach(self, told: Mapping[str, list[Any]], outputs: Mapping[int, EngineCoreOutputs]) -> None:
        """Send the gates with the tokens."""
        if not told:
            return
        for each in outputs.values():
            for output in each.outputs:
                if output.new_token_ids and (fields := told.get(output.request_id)) is not None:
                    output.kv_transfer_params = {GATES: fields}
                    self._prompts.pop(output.request_id, None)
