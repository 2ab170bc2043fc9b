"""X-LoRA over any Hugging Face causal model from a prepared bundle, in plain torch: slow, and what tests compare with.

Two full passes over the whole sequence for every token, as in PEFT; also the mixing modes PEFT lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xloom.xlora.lora import LoraWeights, read_lora
from xloom.xlora.mixing import gated_delta, rank_gates
from xloom.xlora.routing import Routing


@dataclass(frozen=True)
class Reference:
    """A model and a prepared bundle on it. The model itself stays as it was."""

    model: nn.Module
    weights: LoraWeights
    routing: Routing

    @classmethod
    def load(cls, model: nn.Module, prepared: Path) -> Reference:
        """Read a prepared bundle for `model`. Raises `XloomError`."""
        return cls(model, read_lora(prepared), Routing.load(prepared))

    @contextmanager
    def _mixed(self, gates: Tensor) -> Iterator[None]:
        """Within it, every adapted module adds its gated delta; gates `[num_tokens, M, K]`."""
        linears = dict(self.model.named_modules())
        handles = []
        for index, name in enumerate(self.routing.modules):
            a, b = self.weights.tensors[name]
            gate = rank_gates(gates[:, index], self.routing.segments[index])

            def add(
                module: nn.Module, args: Any, result: Tensor, a: Tensor = a, b: Tensor = b, g: Tensor = gate
            ) -> Tensor:
                return result + gated_delta(args[0].to(a.dtype), a, b, g.to(a.dtype)).to(result.dtype)

            handles.append(linears[name].register_forward_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def gates(self, ids: Sequence[int]) -> Tensor:
        """The gates `[num_tokens, M, K]` of one prompt, from the scaling pass."""
        inputs = torch.tensor([list(ids)])
        with self._mixed(self.routing.scaling_pass_gates().expand(len(ids), -1, -1)):
            scaling = self.model(input_ids=inputs, use_cache=False, output_hidden_states=True)
        return self.routing.gates(scaling.hidden_states[-1][0])

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits `[num_tokens, vocab]` of one prompt."""
        with self._mixed(self.gates(ids)):
            logits: Tensor = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits

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
