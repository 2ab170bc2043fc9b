"""Mixtures over any Hugging Face causal model from a prepared folder, in plain torch: slow; what tests compare with.

X-LoRA takes two full passes over the whole sequence for every token, as in PEFT; also the mixing modes PEFT lacks, and
routing in one pass (`single_pass`). The other kinds take one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xloom.mixtures.hooks import Adapter, Span, adapted
from xloom.mixtures.routing.fixed import FixedRouting
from xloom.mixtures.routing.inputs import InputRouting
from xloom.mixtures.routing.xlora import XLoraRouting
from xloom.mixtures.single_pass import segment_end
from xloom.mixtures.weights import checked_weights
from xloom.protocol import XloomError


@dataclass(frozen=True)
class Reference:
    """A model and a prepared bundle on it. The model itself stays as it was."""

    model: nn.Module
    bundle: Adapter
    routing: XLoraRouting
    device: torch.device | str = "cpu"

    @classmethod
    def load(cls, model: nn.Module, prepared: Path) -> Reference:
        """Read a prepared bundle for `model`. Raises `XloomError`."""
        bundle = Adapter.load(prepared)
        if bundle.routing is None:
            raise XloomError("broken_bundle", f"{prepared} is no X-LoRA bundle.", "Give a prepared bundle.")
        return cls(model, bundle, bundle.routing)

    def _mixed(self, gates: Tensor) -> AbstractContextManager[None]:
        """Within it, every adapted module adds its gated delta; gates `[num_tokens, M, K]`."""
        return adapted(dict(self.model.named_modules()), [Span(slice(None), self.bundle, gates)])

    def _hidden(self, ids: Sequence[int], gates: Tensor) -> Tensor:
        """The last hidden states `[num_tokens, hidden]` under these gates."""
        with self._mixed(gates):
            found = self.model(
                input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False, output_hidden_states=True
            )
        hidden: Tensor = found.hidden_states[-1][0]
        return hidden

    @torch.no_grad()
    def gates(self, ids: Sequence[int], num_client_tokens: int | None = None, known: Tensor | None = None) -> Tensor:
        """The gates `[num_tokens, M, K]` of one prompt, or of one with an answer from `num_client_tokens` on.

        `known` are those of the first tokens, which one pass goes on from.
        """
        sent = len(ids) if num_client_tokens is None else num_client_tokens
        constant = self.routing.scaling_pass_gates()[None]
        if self.routing.routing_passes == 2:
            return self.routing.gates(self._hidden(ids, constant.expand(len(ids), -1, -1)))
        if known is not None:
            gates = known
        elif self.routing.prefill == "exact":
            gates = self.routing.gates(self._hidden(ids[:sent], constant.expand(sent, -1, -1)))
        else:
            gates = constant
        while (count := len(gates)) < len(ids):
            end = min(segment_end(count, sent, self.routing.prefill), len(ids))
            after = self.routing.gates(self._hidden(ids[:count], gates)[-1:])
            gates = torch.cat([gates, after.expand(end - count, -1, -1)])
        return gates

    @torch.no_grad()
    def _logits(self, ids: Sequence[int], gates: Tensor) -> Tensor:
        with self._mixed(gates):
            logits: Tensor = self.model(
                input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False
            ).logits[0]
        return logits

    def logits(self, ids: Sequence[int], num_client_tokens: int | None = None) -> Tensor:
        """The logits `[num_tokens, vocab]` of one prompt, or of one with an answer from `num_client_tokens` on."""
        return self._logits(ids, self.gates(ids, num_client_tokens))

    def greedy(self, prompt_ids: Sequence[int], n: int) -> list[int]:
        """The next `n` greedy tokens after the prompt, end-of-text ignored."""
        ids, gates = list(prompt_ids), None
        for _ in range(n):
            gates = self.gates(ids, len(prompt_ids), gates)
            ids.append(int(self._logits(ids, gates)[-1].argmax()))
        return ids[len(prompt_ids) :]


@dataclass(frozen=True)
class OnePassReference:
    """A model and a prepared mixture of a kind that takes one row a token, or a plain adapter, on it."""

    model: nn.Module
    mixture: Adapter
    gates: Tensor | None = None  # [1, M, K] in place of a fixed mixture's own

    @classmethod
    def load(cls, model: nn.Module, prepared: Path, weights: Mapping[str, float] | None = None) -> OnePassReference:
        """Read a prepared folder for `model`; `weights` are a request's. Raises `XloomError`."""
        mixture = Adapter.load(prepared)
        if mixture.routing is not None:
            raise XloomError("broken_bundle", f"{prepared} is an X-LoRA bundle.", "See Reference.")
        if weights is None:
            return cls(model, mixture)
        if not isinstance(mixture.mixture, FixedRouting):
            raise XloomError("invalid_weights", f"{prepared} is no mixture of constants.", "Leave the weights out.")
        given = checked_weights(weights, mixture.mixture.adapter_names, str(prepared))
        return cls(model, mixture, mixture.mixture.gates(given)[None])

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits `[num_tokens, vocab]` of one prompt."""
        with adapted(dict(self.model.named_modules()), [Span(slice(None), self.mixture, self.gates)]):
            logits: Tensor = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits

    @torch.no_grad()
    def gates_of(self, ids: Sequence[int]) -> Tensor:
        """The gates `[num_tokens, M, K]` of one prompt."""
        routing, found = self.mixture.mixture, dict[int, Tensor]()
        if isinstance(routing, FixedRouting):
            return (routing.gates()[None] if self.gates is None else self.gates).expand(len(ids), -1, -1)
        assert isinstance(routing, InputRouting)

        def keep(number: int) -> Any:
            return lambda linear, inputs: found.update({number: routing.gates(number, inputs[0][0])})

        linears = dict(self.model.named_modules())
        handles = [linears[name].register_forward_pre_hook(keep(n)) for n, name in enumerate(routing.modules)]
        try:
            self.logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[number] for number in range(len(routing.modules))], 1)

    def greedy(self, prompt_ids: Sequence[int], n: int) -> list[int]:
        """The next `n` greedy tokens after the prompt, end-of-text ignored."""
        ids = list(prompt_ids)
        for _ in range(n):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt_ids) :]


def reference_logits(model: nn.Module, prepared: Path, ids: Sequence[int]) -> Tensor:
    """The logits `[num_tokens, vocab]` of one prompt under a prepared bundle."""
    return Reference.load(model, prepared).logits(ids)


def reference_greedy(model: nn.Module, prepared: Path, prompt_ids: Sequence[int], n: int) -> list[int]:
    """The next `n` greedy tokens after the prompt under a prepared bundle, end-of-text ignored."""
    return Reference.load(model, prepared).greedy(prompt_ids, n)
