"""The deployment's model in plain torch, teacher-forced: what an engine's log-probabilities ought to be.

From the same prepared folders that the engine loads. It is computed before or after the engine has the memory, never
beside it on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from xloom.mixtures.hooks import Adapter, Span, adapted
from xloom.mixtures.reference import Reference
from xloom.verification.comparison import Scores
from xloom.verification.judgement import BASE, EVEN, HELD, SUM


class PlainModel:
    """A Hugging Face model with adapters and mixtures by hooks. Not for threads: the hooks are on the model."""

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self._model, self._device = model, torch.device(device)
        self._modules = dict(model.named_modules())
        self._dtype = next(model.parameters()).dtype

    def adapter(self, prepared: Path) -> Adapter:
        """Read a prepared adapter or bundle for this model. Raises `XloomError`."""
        found = Adapter.load(prepared, self._device, self._dtype)
        found.check(self._modules)
        return found

    @torch.inference_mode()
    def scores(
        self, prompt: Sequence[int], tokens: Sequence[int], adapter: Adapter | None = None, gates: Tensor | None = None
    ) -> Scores:
        """The log-probabilities of a prompt and of the tokens that an engine went on with.

        `gates` `[num_tokens, M, K]` instead of all 1.
        """
        ids = self._ids([*prompt, *tokens])
        with adapted(self._modules, [Span(slice(None), adapter, gates)] if adapter else []):
            logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
        found = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        cut = len(prompt) - 1
        return Scores(tuple(found[:cut]), tuple(tokens), tuple(found[cut:]))

    @torch.inference_mode()
    def gates(self, prompt: Sequence[int], tokens: Sequence[int], bundle: Adapter) -> Tensor:
        """A bundle's gates `[num_tokens, M, K]` over a prompt and its answer."""
        assert bundle.routing is not None
        reference = Reference(self._model, bundle, bundle.routing, self._device)
        return reference.gates([*prompt, *tokens], len(prompt))

    def served(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Scores], prepared: Path, *, all_faults: bool
    ) -> tuple[list[Scores], dict[str, list[Scores]]]:
        """What an adapter or bundle ought to say of an engine's answers, and what it would say wrongly served.

        Of a bundle the plain sum of its adapters; with `all_faults` also even gates, gates of the prompt's last token
        held while decoding, and the base model.
        """
        adapter = self.adapter(prepared)
        right: list[Scores] = []
        wrong: dict[str, list[Scores]] = {}
        for prompt, answer in zip(prompts, answers, strict=True):
            if all_faults:
                wrong.setdefault(BASE, []).append(self.scores(prompt, answer.tokens))
            if adapter.routing is None:
                right.append(self.scores(prompt, answer.tokens, adapter))
                continue
            gates = self.gates(prompt, answer.tokens, adapter)
            right.append(self.scores(prompt, answer.tokens, adapter, gates))
            wrong.setdefault(SUM, []).append(self.scores(prompt, answer.tokens, adapter))
            if all_faults:
                even = gates.mean(dim=-1, keepdim=True).expand_as(gates)
                wrong.setdefault(EVEN, []).append(self.scores(prompt, answer.tokens, adapter, even))
                held = gates.clone()
                held[len(prompt) :] = gates[len(prompt) - 1]
                wrong.setdefault(HELD, []).append(self.scores(prompt, answer.tokens, adapter, held))
        return right, wrong

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self._device)


def changes_something(prepared: Path) -> bool:
    """Whether any A and B of a prepared folder are not all zero. Raises `XloomError`."""
    adapter = Adapter.load(prepared)
    return any(bool(module.a.any()) and bool(module.b.any()) for module in adapter.modules.values())
