"""X-LoRA over any Hugging Face causal model from a prepared bundle, in plain torch: slow, and what tests compare with.

Two full passes over the whole sequence for every token, as in PEFT; also the mixing modes PEFT lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from xloom.mixtures.hooks import Adapter, Span, adapted
from xloom.mixtures.routing import Routing
from xloom.protocol import XloomError


@dataclass(frozen=True)
class Reference:
    """A model and a prepared bundle on it. The model itself stays as it was."""

    model: nn.Module
    bundle: Adapter
    routing: Routing

    @classmethod
    def load(cls, model: nn.Module, prepared: Path) -> Reference:
        """Read a prepared bundle for `model`. Raises `XloomError`."""
        bundle = Adapter.load(prepared)
        if bundle.routing is None:
            raise XloomError("broken_bundle", f"{prepared} is a plain adapter.", "Give a prepared bundle.")
        return cls(model, bundle, bundle.routing)

    def _mixed(self, gates: Tensor) -> AbstractContextManager[None]:
        """Within it, every adapted module adds its gated delta; gates `[num_tokens, M, K]`."""
        return adapted(dict(self.model.named_modules()), [Span(slice(None), self.bundle, gates)])

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
