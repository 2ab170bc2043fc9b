"""A base model with a stack of adapters on it, gated by a router: batches in, logits or hidden states out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from xloom.compose.router import BundleRouter, ConstantRouter, Router
from xloom.mixtures.hooks import GatedModule
from xloom.mixtures.mixing import gated_delta, rank_gates
from xloom.mixtures.stacking import Stack

Watcher = Callable[[int, Tensor, Tensor], None]  # place, the linear's input [batch, tokens, in], gates


class Mixture:
    """Model and adapters stay as they are; gradients reach the router alone."""

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        self.model, self.stack = model.eval().requires_grad_(False), stack
        self._modules = dict(model.named_modules())
        parameter = next(model.parameters())
        adapters = torch.arange(len(stack.names))
        self._linears: dict[str, GatedModule] = {}
        for place, name in enumerate(stack.modules):
            a, b = (tensor.to(parameter.device, parameter.dtype) for tensor in stack.tensors[name])
            columns = rank_gates(adapters, stack.segments[place]).to(parameter.device)
            self._linears[name] = GatedModule(a, b, place, columns)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    @property
    def config(self) -> Any:
        """The text model's configuration (transformers)."""
        model: Any = self.model
        return model.config.get_text_config()

    def logits(self, ids: Tensor, router: Router | None, watch: Watcher | None = None) -> Tensor:
        """The logits `[batch, tokens, vocab]`, float32, of ids `[batch, tokens]`; without a router the base model's."""
        with self._under(ids, router, watch):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def watch(self, ids: Tensor, router: Router | None, watch: Watcher | None = None) -> None:
        """Run the layers alone, without the logits, and show each linear's input and gates."""
        with torch.no_grad():
            if router is None:
                router = ConstantRouter([0.0] * len(self.stack.names), self.device)
            self._hidden(ids, router, watch)

    @torch.no_grad()
    def base_hidden(self, ids: Tensor) -> Tensor:
        """The base model's last hidden states `[batch, tokens, hidden]`, after the final norm."""
        return self._hidden(ids, None)

    @torch.no_grad()
    def scaling_hidden(self, ids: Tensor, router: Router) -> Tensor:
        """The last hidden states `[batch, tokens, hidden]` of the scaling pass that a router asks for."""
        return self._hidden(ids, _scaling_router(router))

    def _hidden(self, ids: Tensor, router: Router | None, watch: Watcher | None = None) -> Tensor:
        with self._under(ids, router, watch):
            inner: Any = self.model.base_model  # transformers: the model without its head
            hidden: Tensor = inner(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        return hidden

    def _under(self, ids: Tensor, router: Router | None, watch: Watcher | None) -> Any:
        if router is None:
            return nullcontext()
        router.begin(None if router.scaling_pass is None else self.scaling_hidden(ids, router))
        return self._hooked(router, watch)

    @contextmanager
    def _hooked(self, router: Router, watch: Watcher | None) -> Iterator[None]:
        handles = [
            self._modules[name].register_forward_hook(_hook(linear, router, watch))
            for name, linear in self._linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _ScalingRouter(Router):
    """The constant gates of a bundle's scaling pass, which may differ from linear to linear."""

    def __init__(self, bundle: BundleRouter) -> None:
        super().__init__()
        self._bundle = [bundle]

    def gates(self, place: int, x: Tensor) -> Tensor:
        return self._bundle[0].scaling_gates(place).expand(*x.shape[:-1], -1)


def _scaling_router(router: Router) -> Router | None:
    return _ScalingRouter(router) if router.scaling_pass and isinstance(router, BundleRouter) else None


def _hook(linear: GatedModule, router: Router, watch: Watcher | None) -> Any:
    columns = linear.columns
    assert columns is not None

    def add(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        x = args[0]
        gates = router.gates(linear.index, x)
        if watch is not None:
            watch(linear.index, x, gates)
        wide = gates.index_select(-1, columns).to(linear.a.dtype)
        return result + gated_delta(x.to(linear.a.dtype), linear.a, linear.b, wide).to(result.dtype)

    return add
