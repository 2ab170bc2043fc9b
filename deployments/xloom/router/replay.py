"""What becomes of a request whose replica is lost: a pure function of the request and its tokens so far."""

from __future__ import annotations

from typing import Any

import msgspec

from xloom.protocol import TokenRequest, XloomError

MAX_ATTEMPTS = 3  # replicas one request may lose, the last one included

# vLLM SamplingParams fields whose state is kept over the *generated* tokens: as prompt tokens, those so far
# would count differently (penalties), or the state would start afresh in the middle (grammars, budgets).
_STATEFUL = (
    "presence_penalty",
    "frequency_penalty",
    "structured_outputs",
    "prompt_logprobs",
    "prompt_logprob_token_ids",
    "bad_words",
    "thinking_token_budget",
    "repetition_detection",
    "trace_decode_token_ids",
    "extra_args",
)


def obstacle(sampling: dict[str, Any]) -> str | None:
    """The parameter that forbids going on elsewhere after tokens were emitted, or None."""
    return next((field for field in _STATEFUL if sampling.get(field)), None)


def replay(request: TokenRequest, tokens: list[int], attempts: int) -> TokenRequest:
    """The request that goes on where `request` stopped: prompt plus tokens so far, and the limits reduced.

    `attempts` is the number of replicas that have had it. Raises `XloomError` (replica_lost) when it can't go on.
    """
    if attempts >= MAX_ATTEMPTS:
        raise _lost(f"{attempts} replicas in a row were lost while they served this request.")
    if not tokens:
        return request
    field = obstacle(request.sampling)
    if field is not None:
        raise _lost(f"The replica was lost, and a request with {field} can't go on elsewhere once tokens were sent.")
    sampling = dict(request.sampling)
    if sampling.get("max_tokens") is not None:
        sampling["max_tokens"] -= len(tokens)
    else:
        sampling["max_tokens"] = max(1, 16 - len(tokens))  # 16 is the default that `omit_defaults` left out
    if sampling.get("min_tokens"):
        sampling["min_tokens"] = max(0, sampling["min_tokens"] - len(tokens))
    if sampling["max_tokens"] < 1:
        raise _lost("The replica was lost between the last token and its finish reason.")
    sent = request.num_client_tokens
    return msgspec.structs.replace(
        request,
        prompt_token_ids=[*request.prompt_token_ids, *tokens],
        num_client_tokens=len(request.prompt_token_ids) if sent is None else sent,
        sampling=sampling,
    )


def _lost(message: str) -> XloomError:
    return XloomError("replica_lost", message, "Send the request again.", 503)
