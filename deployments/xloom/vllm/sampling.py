"""vLLM's `SamplingParams` as plain data, and back.

Relies on vLLM 0.32 `vllm.sampling_params.SamplingParams` being a msgspec Struct whose private fields
(`_eos_token_id`, `_all_stop_token_ids`, `_bad_words_token_ids`) are fields like the others.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from vllm.sampling_params import SamplingParams


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise NotImplementedError(f"{type(value).__name__} can't cross to a replica")


def _decode(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        return np.asarray(value)
    raise NotImplementedError(f"{kind.__name__} can't be read from a router")


def sampling_to_dict(params: SamplingParams) -> dict[str, Any]:
    """Field name to plain value; fields at their defaults are left out."""
    plain: dict[str, Any] = msgspec.to_builtins(params, enc_hook=_encode)
    return plain


def sampling_from_dict(fields: dict[str, Any]) -> SamplingParams:
    """The parameters `sampling_to_dict` was given. Raises `msgspec.ValidationError` on a field of the wrong type."""
    return msgspec.convert(fields, SamplingParams, dec_hook=_decode)
