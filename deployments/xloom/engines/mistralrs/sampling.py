"""vLLM's sampling fields as mistral.rs takes them, and what it can't do refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xloom.protocol import XloomError

DEFAULT_MAX_TOKENS = 16  # vLLM's SamplingParams.max_tokens

# Fields that concern the text made of the tokens, which the caller makes, or that change nothing here.
NOT_THE_ENGINES = frozenset(
    {
        "_all_stop_token_ids",
        "_eos_token_id",
        "_watermarking_skipped",
        "detokenize",
        "flat_logprobs",
        "ignore_eos",
        "include_stop_str_in_output",
        "max_tokens",
        "output_kind",
        "output_text_buffer_length",
        "routed_experts_prompt_start",
        "skip_clone",
        "skip_reading_prefix_cache",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "stream_interval",
    }
)
MAPPED = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    }
)
# What a field may say without asking for anything.
OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "min_tokens": (0,),
    "watermarking": (None, False),
}


@dataclass(frozen=True)
class Stops:
    """The tokens that end a request."""

    eos: frozenset[int]  # end it without a reason
    listed: frozenset[int]  # end it with themselves as the reason

    def reason(self, token: int) -> tuple[bool, int | None]:
        """Whether the token ends the request, and the reason to give."""
        if token in self.eos:
            return True, None
        return (True, token) if token in self.listed else (False, None)


def stops(sampling: dict[str, Any], model_eos: frozenset[int]) -> Stops:
    """What ends a request: the end of text the caller names, or the model's own, and the tokens it lists."""
    listed = frozenset(sampling.get("stop_token_ids") or ())
    if sampling.get("ignore_eos"):
        return Stops(frozenset(), listed)
    named = sampling.get("_eos_token_id")
    return Stops(model_eos if named is None else frozenset([named]), listed)


def token_limit(sampling: dict[str, Any], remaining: int) -> int:
    """How many tokens a request may make, with `remaining` of them left in the context."""
    wanted = sampling.get("max_tokens", DEFAULT_MAX_TOKENS)
    return remaining if wanted is None else min(int(wanted), remaining)


def request_options(sampling: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of mistral.rs's `ChatCompletionRequest` (0.9.5). Raises `XloomError` naming the field.

    Said outright, lest defaults of the model or of mistral.rs come in; greedy is temperature 0.
    """
    temperature = float(sampling.get("temperature", 1.0))
    options: dict[str, Any] = {"temperature": max(temperature, 0.0)}
    if temperature > 0:
        options["top_p"] = float(sampling.get("top_p", 1.0))
        if sampling.get("top_k", 0) > 0:
            options["top_k"] = int(sampling["top_k"])
        if sampling.get("min_p", 0.0) > 0:
            options["min_p"] = float(sampling["min_p"])
    # As in vLLM the first two count the tokens made, the third the prompt's too (mistral.rs 0.9.5, by trial).
    for penalty in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        if sampling.get(penalty) is not None:
            options[penalty] = float(sampling[penalty])
    if sampling.get("logit_bias"):
        options["logit_bias"] = {int(token): float(bias) for token, bias in sampling["logit_bias"].items()}
    for field, value in sampling.items():
        if field in MAPPED or field in NOT_THE_ENGINES or value in OFF.get(field, (None, [])):
            continue
        raise XloomError(
            "unsupported_sampling",
            f"The mistralrs backend can't do {field.lstrip('_')}.",
            "Leave it out, or serve with engine.backend: vllm.",
        )
    return options
