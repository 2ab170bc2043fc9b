"""What vLLM's workers can't hold is refused when it comes: there it would end the engine, and every request on it.

Relies on vLLM 0.32: the V2 runner's `vllm.v1.worker.gpu.sample.{logit_bias, bad_words, states}` and `...gpu.states`,
which keep a request's fields in arrays of these sizes and raise in the worker, where nobody catches it. The V1 runner
(`vllm.v1.worker.gpu_input_batch`) has no such limits, but both index logits with the tokens. What vLLM's own
`SamplingParams.verify` holds against the vocabulary or a limit, a router's front end has checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xloom.protocol import XloomError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

_INT64 = 2**63 - 1


@dataclass(frozen=True)
class RequestLimits:
    """How many of each a request may have; None for as many as it likes."""

    allowed_token_ids: int | None = None
    logit_bias: int | None = None
    stop_token_ids: int | None = None  # the model's own ends of text included
    bad_words: int | None = None
    bad_words_tokens: int | None = None

    @classmethod
    def of(cls, config: VllmConfig) -> RequestLimits:
        """Those of the runner that this configuration gets."""
        if not config.use_v2_model_runner:
            return cls()
        from vllm import envs
        from vllm.v1.worker.gpu.sample import logit_bias

        return cls(
            logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS,
            logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS,
            logit_bias.MAX_NUM_STOP_TOKEN_IDS,
            envs.VLLM_MAX_NUM_BAD_WORDS,
            envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS,
        )

    def check(self, sampling: SamplingParams, vocabulary: int) -> None:
        """Raises `XloomError` (invalid_sampling)."""
        bad_words = sampling.bad_words_token_ids or []
        tokens = {
            "allowed_token_ids": sampling.allowed_token_ids or [],
            "logit_bias": list(sampling.logit_bias or {}),
            "stop_token_ids": list(sampling.all_stop_token_ids) if sampling.min_tokens > 0 else [],  # used only then
            "bad_words": [token for word in bad_words for token in word],
        }
        for name, ids in tokens.items():
            if any(not 0 <= token < vocabulary for token in ids):
                raise _refused(f"{name} holds a token outside 0 to {vocabulary - 1}")
        counts = {
            "allowed_token_ids": (len(tokens["allowed_token_ids"]), self.allowed_token_ids),
            "logit_bias": (len(tokens["logit_bias"]), self.logit_bias),
            "bad_words": (len(bad_words), self.bad_words),
            "stop_token_ids beside min_tokens": (len(tokens["stop_token_ids"]), self.stop_token_ids),
            "the tokens of bad_words": (len(tokens["bad_words"]), self.bad_words_tokens),
        }
        for name, (count, limit) in counts.items():
            if limit is not None and count > limit:
                raise _refused(f"{name} has {count} entries; this engine takes {limit}")
        if sampling.seed is not None and not -_INT64 - 1 <= sampling.seed <= _INT64:
            raise _refused("seed is beyond 64 bits with a sign")


def cap_lengths(sampling: SamplingParams, max_model_len: int) -> None:
    """Ask for no more tokens than the context has: the answer is the same, and the numbers fit a worker's 32 bits."""
    asked = sampling.max_tokens
    sampling.max_tokens = max_model_len if asked is None else min(asked, max_model_len)
    sampling.min_tokens = min(sampling.min_tokens, sampling.max_tokens)


def _refused(message: str) -> XloomError:
    return XloomError("invalid_sampling", f"{message}.", "See vLLM's SamplingParams for what it takes.")
