"""What a router is trained by: the language model's loss, and each token's domain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from xloom.compose.mixture import Mixture
from xloom.compose.router import Router

_TINY = 1e-9


def language_loss(mixture: Mixture, router: Router, ids: Tensor, domains: Tensor, share: float) -> Tensor:
    """The mean negative log-likelihood of a token, plus `share` of the cross-entropy between mean gate and domain.

    `domains` `[batch, tokens]` numbers each token's adapter, -1 where it is not known. A token's mean gate is over the
    linears, made to add up to 1.
    """
    total: list[Tensor] = []

    def add(place: int, x: Tensor, gates: Tensor) -> None:
        total[:] = [total[0] + gates] if total else [gates]

    logits = mixture.logits(ids, router, add if share else None)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    known = domains >= 0
    if share and bool(known.any()):
        mean = total[0][known]
        mean = mean / mean.sum(-1, keepdim=True).clamp_min(_TINY)
        loss = loss + share * torch.nn.functional.nll_loss(torch.log(mean + _TINY), domains[known])
    return loss
