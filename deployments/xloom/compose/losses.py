"""What a router learns from: the language model's loss, each token's domain, or a bundle's own gates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div

from xloom.compose.learned import LinearRouter
from xloom.compose.mixture import Mixture
from xloom.compose.router import BundleRouter, Router

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


def gate_loss(mixture: Mixture, router: LinearRouter, bundle: BundleRouter, ids: Tensor) -> Tensor:
    """How far a linear router's gates are from a bundle's, on the inputs that its linears have under the bundle.

    The mean over tokens and linears of the Kullback-Leibler divergence; for sigmoid gates of that of each gate, added.
    """
    losses: list[Tensor] = []

    def compare(place: int, x: Tensor, gates: Tensor) -> None:
        with torch.enable_grad():
            logits, wanted = router.logits(place, x), gates.float()
            if router.activation == "softmax":
                losses.append(kl_div(torch.log_softmax(logits, -1), wanted, reduction="sum") / wanted[..., 0].numel())
                return
            present = mixture.stack.present(place).to(logits.device)
            logits, wanted = logits[..., present], wanted[..., present].clamp(0, 1)
            chosen = torch.special.entr(wanted) + torch.special.entr(1 - wanted)
            crossed = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            losses.append((crossed - chosen).sum(-1).mean())

    mixture.watch(ids, bundle, compare)
    return torch.stack(losses).mean()
