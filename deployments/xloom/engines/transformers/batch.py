"""One step of a Hugging Face model over new tokens of several requests: packed into one row, each with its own caches.

All linears, and with them LoRA, run over the whole batch at once; attention runs request by request, over the
request's own keys and values. So requests of any length, prefill and decode, need no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicCache

from xloom.mixtures.hooks import Adapter, Span, adapted
from xloom.mixtures.routing.fixed import FixedRouting
from xloom.mixtures.routing.inputs import InputRouting
from xloom.mixtures.tally import MixtureTally

ATTENTION = "xloom_packed"
# Architectures whose attention is causal, plain or in a sliding window, and goes through AttentionInterface alone:
# what `packed_attention` computes. Each is in the tests. Another runs its requests one after another.
PACKED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral"})


def packs(config: Any) -> bool:
    """Whether a model of this configuration can run a packed batch."""
    return config.model_type in PACKED


class _Packed(NamedTuple):
    """What the packed cache hands the attention in place of a tensor: keys or values `[1, heads, length, dim]` each."""

    states: tuple[Tensor, ...]
    lengths: list[int]  # new tokens of each request


class PackedCache(Cache):
    """The caches of several requests behind the interface of one: each takes the rows of its request.

    Relied on: models call `update` and hand what it returns to the attention function untouched; transformers 5.19.
    """

    def __init__(self, caches: Sequence[DynamicCache], lengths: list[int]) -> None:
        super().__init__(layers=[])
        self._caches, self._lengths = caches, lengths

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[_Packed, _Packed]:
        """Append new keys and values `[1, heads, num_tokens, dim]`; all of each request's."""
        rows = zip(key_states.split(self._lengths, 2), value_states.split(self._lengths, 2), strict=True)
        found = [cache.update(k, v, layer_idx) for cache, (k, v) in zip(self._caches, rows, strict=True)]
        keys, values = zip(*found, strict=True)
        return _Packed(keys, self._lengths), _Packed(values, self._lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No length is that of all; positions are given."""
        return 0


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: _Packed,
    value: _Packed,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each request's new tokens over its own keys: query `[1, heads, num_tokens, dim]`.

    Called through transformers.AttentionInterface (5.19), which wants `[1, num_tokens, heads, dim]` back.
    """
    outputs = [
        _attend(q[0], k[0], v[0], scaling, sliding_window, softcap)
        for q, k, v in zip(query.split(key.lengths, 2), key.states, value.states, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0).contiguous(), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """q `[heads, new, dim]`, k and v `[kv_heads, length, dim]`, the newest last: `[heads, new, dim]`."""
    heads, new, dim = q.shape
    kv_heads, length = k.shape[:2]
    groups = heads // kv_heads
    q = q.reshape(kv_heads, groups, new, dim)
    k = k[:, None].expand(-1, groups, -1, -1)
    v = v[:, None].expand(-1, groups, -1, -1)
    mask = None
    if new > 1 or (window is not None and length > window):
        distance = torch.arange(length - new, length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
    if softcap is None:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:  # as eager_attention_forward of transformers' gemma2; its sdpa leaves the cap out
        scores = torch.tanh(q @ k.transpose(-1, -2) * (scaling or dim**-0.5) / softcap) * softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    return out.reshape(heads, new, -1)


AttentionInterface.register(ATTENTION, packed_attention)


@dataclass(frozen=True)
class Caches:
    """The keys and values of one request: those of the forward pass, and with X-LoRA those of the scaling pass."""

    forward: DynamicCache
    scaling: DynamicCache | None


@dataclass(frozen=True)
class Part:
    """New tokens of one request in a step."""

    tokens: Sequence[int]
    start: int  # position of the first
    adapter: Adapter | None
    caches: Caches
    all_logits: bool = False  # of every token; else of the last alone
    constant: Tensor | None = None  # [M, K]: the gates that its request brings


class BatchRunner:
    """Runs parts of requests through the model: base, adapters and X-LoRA in one batch.

    X-LoRA takes two passes, as in PEFT: the scaling pass gives the gates, the forward pass the logits. Each has its
    own keys and values, since the scaling pass at a token attends to what the scaling pass made of those before it.
    With both cached, a step costs two passes over its new tokens; PEFT's own `generate` runs two over all of them.
    """

    def __init__(self, model: Any, *, batching: bool) -> None:
        self._model = model
        self._batching = batching
        self.tally = MixtureTally(model.device)
        self._gates: dict[int, Tensor] = {}  # [num_tokens, M, K] of each part of the last run
        self._modules: Mapping[str, nn.Module] = dict(model.named_modules())
        head = model.get_output_embeddings()
        self._head = next((name for name, module in self._modules.items() if module is head), "")

    def caches(self, adapter: Adapter | None) -> Caches:
        """Empty caches for a request."""
        twice = adapter is not None and adapter.routing is not None
        config = self._model.config
        return Caches(DynamicCache(config=config), DynamicCache(config=config) if twice else None)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> list[Tensor]:
        """The logits of each part, `[1 or num_tokens, vocab]`; the parts' caches grow by their tokens."""
        self._gates = {}
        if not self._batching:
            return [self._run([part])[0] for part in parts]
        keys = [(id(part.adapter), part.constant is None) for part in parts]
        order = sorted(range(len(parts)), key=keys.__getitem__)  # one span an adapter
        logits = dict(zip(order, self._run([parts[number] for number in order]), strict=True))
        return [logits[number] for number in range(len(parts))]

    def gates(self, part: Part) -> Tensor | None:
        """The gates `[num_tokens, M, K]` that a part of the last run had; None but of mixtures."""
        return self._gates.get(id(part))

    def _run(self, parts: Sequence[Part]) -> list[Tensor]:
        routed = [part for part in parts if part.caches.scaling is not None]
        gates: dict[int, Tensor] = {}
        if routed:
            self.tally.start()
            with adapted(self._modules, self._scaling_spans(routed)):
                output = self._pass(self._model.base_model, routed, [_scaling(part) for part in routed])
            self.tally.lap()
            rows = output.last_hidden_state[0].split([len(part.tokens) for part in routed])
            gates = {id(part): _routing(part).gates(hidden) for part, hidden in zip(routed, rows, strict=True)}
        for part in parts:
            if part.constant is not None:
                gates[id(part)] = part.constant.expand(len(part.tokens), -1, -1)
        groups, spans = _groups(parts), []
        for rows, adapter, group in groups:
            given = torch.cat([gates[id(part)] for part in group]) if id(group[0]) in gates else None
            spans.append(Span(rows, adapter, given, {} if isinstance(adapter.mixture, InputRouting) else None))
        for span in spans:
            if span.gates is not None and span.adapter.routing is not None:
                self.tally.add(span.adapter.name, span.adapter.routing, span.gates)
        all_rows = any(part.adapter is not None and self._head in part.adapter.modules for part in parts)
        wanted = _logit_rows(parts, self._model.device)
        keep: Any = 0 if all_rows else wanted  # an adapted head must see every row, as its spans count them
        if routed:
            self.tally.lap()
        with adapted(self._modules, spans):
            output = self._pass(self._model, parts, [part.caches.forward for part in parts], logits_to_keep=keep)
        if routed:
            self.tally.lap()
        self._gates |= gates
        for span, (_, adapter, group) in zip(spans, groups, strict=True):
            if span.made is not None:
                made = torch.stack([span.made[number][0] for number in range(len(span.made))], 1)
                by_part = made.split([len(part.tokens) for part in group])
                self._gates |= {id(part): own for part, own in zip(group, by_part, strict=True)}
            elif span.gates is None and isinstance(adapter.mixture, FixedRouting):
                constant = adapter.mixture.gates()
                self._gates |= {id(part): constant.expand(len(part.tokens), -1, -1) for part in group}
        logits = output.logits[0]
        counts = [len(part.tokens) if part.all_logits else 1 for part in parts]
        return list((logits[wanted] if all_rows else logits).split(counts))

    def _pass(self, model: Any, parts: Sequence[Part], caches: Sequence[DynamicCache], **options: Any) -> Any:
        device = self._model.device
        ids = torch.tensor([[token for part in parts for token in part.tokens]], device=device)
        positions = [part.start + offset for part in parts for offset in range(len(part.tokens))]
        cache = PackedCache(caches, [len(part.tokens) for part in parts]) if self._batching else caches[0]
        return model(
            input_ids=ids,
            position_ids=torch.tensor([positions], device=device),
            past_key_values=cache,
            use_cache=True,
            **options,
        )

    def _scaling_spans(self, parts: Sequence[Part]) -> list[Span]:
        """The constant gates of the scaling pass; none where they are zero, as by default."""
        spans = []
        for rows, adapter, _ in _groups(parts):
            routing = adapter.routing
            if routing is not None and routing.scaling_pass_value:
                constant = routing.scaling_pass_gates().expand(rows.stop - rows.start, -1, -1)
                spans.append(Span(rows, adapter, constant))
        return spans


def _routing(part: Part) -> Any:
    assert part.adapter is not None
    return part.adapter.routing


def _scaling(part: Part) -> DynamicCache:
    assert part.caches.scaling is not None
    return part.caches.scaling


def _groups(parts: Sequence[Part]) -> list[tuple[slice, Adapter, list[Part]]]:
    """Neighbours with one adapter, whose gates come from one place, and their rows."""
    found: list[tuple[slice, Adapter, list[Part]]] = []
    start = 0
    for part in parts:
        stop = start + len(part.tokens)
        if part.adapter is not None:
            alike = found and (part.constant is None) == (found[-1][2][-1].constant is None)
            if alike and found[-1][1] is part.adapter and found[-1][0].stop == start:
                rows, adapter, group = found.pop()
                found.append((slice(rows.start, stop), adapter, [*group, part]))
            else:
                found.append((slice(start, stop), part.adapter, [part]))
        start = stop
    return found


def _logit_rows(parts: Sequence[Part], device: torch.device) -> Tensor:
    """The rows of the batch whose logits are wanted."""
    rows: list[int] = []
    start = 0
    for part in parts:
        stop = start + len(part.tokens)
        rows += range(start, stop) if part.all_logits else [stop - 1]
        start = stop
    return torch.tensor(rows, device=device)
