"""What every engine asks of a prompt before it takes it."""

from __future__ import annotations

from collections.abc import Sequence

from xloom.protocol import XloomError


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
