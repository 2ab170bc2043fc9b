"""Routing in one pass: a token's gates come from the mixture's own last hidden state of a token before it.

X-LoRA reads the hidden state that a pass of its own gives for the very token. Here generated tokens do without that
pass: token t has the gates of token t - 1's hidden state, which the mixture itself has computed. What holds for the
prompt is the `prefill`:

- `exact`: the scaling pass, as X-LoRA has it; it ends with the prompt.
- `lagged`: no scaling pass at all. The prompt is cut into segments, each with the gates of the last token before it.
  They double in length up to `LONGEST`, and lie where they lie however a scheduler cuts the prompt.

It is another model than the bundle's own: docs/x-lora.md says what that costs.
"""

from __future__ import annotations

LONGEST = 32  # tokens of a segment


def segment_end(position: int, num_prompt_tokens: int, prefill: str) -> int:
    """The first token after `position` that has gates of its own.

    `num_prompt_tokens` is the number of tokens the client sent: what was generated since counts as generated, also
    when it is computed again. In an `exact` prompt every token has gates of its own, from the scaling pass.
    """
    if position >= num_prompt_tokens or prefill == "exact":
        return position + 1
    longest = LONGEST * (position // LONGEST + 1)
    doubled = 1 << position.bit_length()  # 1, 2, 4, ... above it
    return min(longest, doubled, num_prompt_tokens)
