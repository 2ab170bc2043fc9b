"""What every engine asks of a request before it takes it."""

from __future__ import annotations

from collections.abc import Sequence

from xloom.protocol import TokenRequest, XloomError


def check_prompt(prompt: Sequence[int], *, vocabulary: int, max_model_len: int) -> None:
    """Refuse what the model can't take. Raises `XloomError`: empty_prompt, context_length_exceeded, invalid_token."""
    if not prompt or len(prompt) >= max_model_len:
        raise XloomError(
            "context_length_exceeded" if prompt else "empty_prompt",
            f"The prompt has {len(prompt)} tokens; this engine takes 1 to {max_model_len - 1}.",
            "Shorten the prompt, or raise engine.max_model_len.",
        )
    if max(prompt) >= vocabulary or min(prompt) < 0:
        raise XloomError(
            "invalid_token", f"The prompt holds a token outside 0 to {vocabulary - 1}.", "Check the tokenizer."
        )


def no_weights(request: TokenRequest) -> XloomError:
    """The error of a request with weights that nothing in this engine has a use for."""
    name = "the base model" if request.adapter is None else repr(request.adapter.name)
    cure = "Leave the weights out, or ask for a mixture with routing fixed."
    return XloomError("invalid_weights", f"Weights were sent, and {name} takes none here.", cure)
