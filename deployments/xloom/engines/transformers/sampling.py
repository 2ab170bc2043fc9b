"""Sampling for the `transformers` backend: one request's parameters, by vLLM's field names, and the tokens drawn.

The order of the steps, and what each does, is that of vLLM 0.32 (`vllm.v1.sample.sampler.Sampler`,
`vllm.v1.core.sched.utils.check_stop`), so that a request gives the same distribution on either backend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from xloom.protocol import Logprobs, XloomError

GREEDY = 1e-5  # temperatures below it; vllm.v1.sample.sampler._SAMPLING_EPS, 0.32
NEVER = float("-inf")

# Fields about the text made of the tokens, which the caller makes, or that change nothing here.
NOT_THE_ENGINES = frozenset(
    {
        "_watermarking_skipped",
        "bad_words",  # their tokens are what counts
        "detokenize",
        "extra_args",
        "flat_logprobs",
        "include_stop_str_in_output",
        "output_kind",
        "output_text_buffer_length",
        "skip_clone",
        "skip_reading_prefix_cache",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stream_interval",
    }
)


class Sampling(msgspec.Struct, frozen=True):
    """The fields of vLLM's `SamplingParams` that this backend heeds, with vLLM's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None  # -1: all
    prompt_logprobs: int | None = None
    eos_token_id: int | None = msgspec.field(default=None, name="_eos_token_id")
    all_stop_token_ids: list[int] = msgspec.field(default_factory=list, name="_all_stop_token_ids")
    bad_words_token_ids: list[list[int]] | None = msgspec.field(default=None, name="_bad_words_token_ids")


_FIELDS = {field.encode_name for field in msgspec.structs.fields(Sampling)}


def read_sampling(fields: Mapping[str, Any], vocabulary: int) -> Sampling:
    """Check a request's sampling fields. Raises `XloomError`: unsupported_sampling, invalid_sampling."""
    given = dict(fields)
    if given.get("bad_words") and "_bad_words_token_ids" not in given:
        raise _unsupported("bad_words without their tokens")
    for name in [name for name in given if name not in _FIELDS]:
        value = given.pop(name)
        if value and name not in NOT_THE_ENGINES and (name, value) != ("n", 1):
            raise _unsupported(name)
    try:
        sampling = msgspec.convert(given, Sampling)
    except msgspec.ValidationError as error:
        raise XloomError("invalid_sampling", f"The sampling parameters can't be read: {error}.") from None
    wrong = _out_of_range(sampling, vocabulary)
    if wrong:
        raise XloomError("invalid_sampling", f"{wrong[0]} is out of range.", "See vLLM's SamplingParams.")
    return sampling


def _unsupported(name: str) -> XloomError:
    return XloomError(
        "unsupported_sampling",
        f"The transformers backend can't do {name.lstrip('_')}.",
        "Leave it out, or serve with engine.backend: vllm.",
    )


def _out_of_range(sampling: Sampling, vocabulary: int) -> list[str]:
    tokens = {
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_token_ids,
        "_all_stop_token_ids": sampling.all_stop_token_ids,
        "_bad_words_token_ids": [token for word in sampling.bad_words_token_ids or () for token in word],
    }
    fine = {
        "temperature": 0 <= sampling.temperature < float("inf"),
        "top_p": 0 < sampling.top_p <= 1,
        "top_k": sampling.top_k >= -1,
        "min_p": 0 <= sampling.min_p <= 1,
        "max_tokens": sampling.max_tokens is None or sampling.max_tokens >= 1,
        "min_tokens": sampling.min_tokens >= 0,
        "repetition_penalty": 0 < sampling.repetition_penalty < float("inf"),
        "logprobs": sampling.logprobs is None or sampling.logprobs >= -1,
        "prompt_logprobs": sampling.prompt_logprobs is None or sampling.prompt_logprobs >= -1,
        "seed": sampling.seed is None or -(2**63) <= sampling.seed < 2**63,
        **{name: all(0 <= token < vocabulary for token in found or ()) for name, found in tokens.items()},
    }
    return [name for name, good in fine.items() if not good]


class Sampler:
    """Draws the tokens of one request, and says when it has come to its end."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], *, eos: Sequence[int], max_model_len: int, device: torch.device
    ) -> None:
        self.sampling = sampling
        self._prompt = sorted(set(prompt))
        self._device = device
        self._made: list[int] = []
        self._counts: Counter[int] = Counter()
        remaining = max_model_len - len(prompt)
        self.max_tokens = remaining if sampling.max_tokens is None else min(sampling.max_tokens, remaining)
        # A front end names the end of text; a bare request has the model's own.
        named = sampling.eos_token_id
        self._eos = () if sampling.ignore_eos else tuple(eos) if named is None else (named,)
        self._stops = frozenset(sampling.stop_token_ids or ())
        self._held_back = sorted({*self._eos, *self._stops, *sampling.all_stop_token_ids})  # until min_tokens
        self._generator: torch.Generator | None = None
        if sampling.temperature >= GREEDY:
            self._generator = torch.Generator(device)
            if sampling.seed is None or sampling.seed == -1:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    def next(self, logits: Tensor) -> tuple[int, Logprobs | None]:
        """The next token after raw `logits` `[vocab]`, and its log-probabilities where they are wanted."""
        raw = logits.float()
        processed = self.processed(raw)
        token = int(processed.argmax()) if self._generator is None else self._draw(processed)
        self._made.append(token)
        self._counts[token] += 1
        count = self.sampling.logprobs
        return token, None if count is None else top_logprobs(raw[None], [token], count)

    def processed(self, raw: Tensor) -> Tensor:
        """`raw` `[vocab]` with all that may change even the most likely token."""
        wanted = self.sampling
        logits = raw.clone()
        if wanted.allowed_token_ids:
            allowed = torch.full_like(logits, NEVER)
            ids = self._tensor(wanted.allowed_token_ids)
            allowed[ids] = logits[ids]
            logits = allowed
        for word in filter(None, wanted.bad_words_token_ids or ()):
            start = len(self._made) - (len(word) - 1)
            if start >= 0 and self._made[start:] == word[:-1]:
                logits[word[-1]] = NEVER
        if len(self._made) < wanted.min_tokens and self._held_back:
            logits[self._tensor(self._held_back)] = NEVER
        if wanted.logit_bias:
            biases = torch.tensor(list(wanted.logit_bias.values()), device=self._device)
            logits[self._tensor(list(wanted.logit_bias))] += biases
        return self._penalised(logits)

    def _penalised(self, logits: Tensor) -> Tensor:
        wanted = self.sampling
        if wanted.repetition_penalty != 1:
            seen = self._tensor(sorted({*self._prompt, *self._counts}))
            scores = logits[seen]
            penalty = wanted.repetition_penalty
            logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        if self._counts and (wanted.frequency_penalty or wanted.presence_penalty):
            made = self._tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), device=self._device)
            logits[made] -= wanted.frequency_penalty * counts + wanted.presence_penalty
        return logits

    def distribution(self, processed: Tensor) -> Tensor:
        """The probabilities `[vocab]` that a token is drawn by, from what `processed` gives."""
        wanted = self.sampling
        logits = processed / wanted.temperature
        if wanted.min_p > 0:
            likely = torch.softmax(logits, dim=-1)
            logits = logits.masked_fill(likely < likely.max() * wanted.min_p, NEVER)
        if 0 < wanted.top_k < logits.numel():
            logits = logits.masked_fill(logits < logits.topk(wanted.top_k).values[-1], NEVER)
        if wanted.top_p < 1:
            ascending, order = logits.sort()
            unlikely = torch.softmax(ascending, dim=-1).cumsum(-1) <= 1 - wanted.top_p
            unlikely[-1] = False  # at least one
            logits = logits.masked_fill(torch.zeros_like(unlikely).scatter(0, order, unlikely), NEVER)
        return torch.softmax(logits, dim=-1)

    def _draw(self, processed: Tensor) -> int:
        # The largest of probability over exponential noise is a draw: vllm...topk_topp_sampler.random_sample, 0.32.
        probabilities = self.distribution(processed)
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
        return int((probabilities / noise).argmax())

    @property
    def made(self) -> int:
        """Tokens drawn so far."""
        return len(self._made)

    def end(self) -> tuple[str | None, int | None]:
        """Why the request ends with its newest token, and which listed token did it; None: it goes on."""
        token = self._made[-1]
        if token in self._eos:
            return "stop", None
        if token in self._stops:
            return "stop", token
        return ("length" if len(self._made) >= self.max_tokens else None), None

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, device=self._device, dtype=torch.long)


def top_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> Logprobs:
    """Of each row `[num_tokens, vocab]` of logits: the token's log-probability, then the `count` largest (-1: all)."""
    scores = torch.log_softmax(logits.float(), dim=-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    own = scores.gather(1, chosen)
    best = scores.topk(scores.shape[1] if count == -1 else min(count, scores.shape[1]), dim=1)
    return Logprobs(
        torch.cat([chosen, best.indices], dim=1).tolist(),
        torch.cat([own, best.values], dim=1).tolist(),
        (scores >= own).sum(dim=1).tolist(),
    )
