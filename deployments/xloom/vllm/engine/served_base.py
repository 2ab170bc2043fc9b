"""Whether an engine serves a quantised model as its base: asked of the engine itself, before it takes requests."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from xloom.protocol import Logprobs, TokenRequest, XloomError

if TYPE_CHECKING:
    from xloom.quantization.fidelity import Reference
    from xloom.vllm.engine.backend import VLLMBackend

logger = logging.getLogger(__name__)


async def check_served(backend: VLLMBackend, reference: Reference, source: str, max_model_len: int) -> None:
    """Hold the engine's log-probabilities of a few texts against the plain model's. No other reader of its steps yet.

    Raises `XloomError`: isq_not_its_base, or engine_error where the engine does not answer.
    """
    length = min(reference.ids.shape[1], max_model_len - 1)  # one token is made
    rows = reference.ids[:, :length].tolist()
    sampling = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
    answers: dict[str, Logprobs | None] = {f"xloom-base-{number}": None for number in range(len(rows))}
    waiting = set(answers)
    for name, row in zip(answers, rows, strict=True):
        await backend.submit(TokenRequest(name, row, sampling))
    steps = backend.steps()
    async for step in steps:
        for chunk in step:
            if chunk.prompt_logprobs is not None:
                answers[chunk.request_id] = chunk.prompt_logprobs
            if chunk.finish_reason is not None:
                waiting.discard(chunk.request_id)
        if not waiting:
            break
    found = [[row[0] for row in answer.logprobs] for answer in answers.values() if answer is not None]
    if len(found) < len(rows) or any(len(each) != length - 1 for each in found):
        raise XloomError(
            "engine_error",
            f"The engine gave no log-probabilities of the texts that {source} is compared with its base by.",
            "See the replica's log.",
            500,
        )
    apart = reference.check(torch.tensor(found), source)
    logger.info("quantised: log-probabilities %.3f from the plain model's, of %.3f allowed", apart, reference.limit)
