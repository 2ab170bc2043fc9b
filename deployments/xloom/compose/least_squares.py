"""A linear router fitted to gates in closed form: ridge regression of their logits on each linear's own input."""

from __future__ import annotations

import torch
from torch import Tensor

from xloom.compose.learned import LinearRouter
from xloom.compose.mixture import Mixture
from xloom.compose.router import Router

RIDGE = 1e-3  # of the mean square of an input's channel


def fit(mixture: Mixture, router: LinearRouter, ids: Tensor, wanted: Tensor) -> None:
    """Fit a router to the logits `[num_tokens, M or 1, K]` wanted of it for the tokens of `ids` `[batch, tokens]`.

    In one forward pass: each linear is fitted to the input that it has under the gates of those fitted before it.
    """
    mixture.watch(ids, _Fitting(router, wanted))


class _Fitting(Router):
    """The gates of a router that is fitted on the way."""

    def __init__(self, router: LinearRouter, wanted: Tensor) -> None:
        super().__init__()
        self._router, self._wanted = [router], wanted * router.temperature  # in a list: no part of this module
        if router.activation == "softmax":
            self._wanted = self._wanted - self._wanted.mean(-1, keepdim=True)

    def gates(self, place: int, x: Tensor) -> Tensor:
        router = self._router[0]
        rows = router.normalised(place, x).flatten(0, 1)
        weight, bias = ridge_regression(rows, self._wanted[:, place if self._wanted.shape[1] > 1 else 0])
        router.weights[place].copy_(weight)
        router.biases[place].copy_(bias)
        return router.gates(place, x)


def ridge_regression(rows: Tensor, wanted: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The weight `[K, in]` and bias `[K]` with the least square error of `wanted` `[count, K]` on `rows` `[count, in]`.

    `ridge` is the penalty on the squared weights, for each row; in double precision.
    """
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device  # which has no double precision
    mean, centre = rows.mean(0), wanted.mean(0)
    rows = rows - mean
    gram = (rows.T @ rows).to(device, torch.float64)
    gram.diagonal().add_(ridge * len(rows))
    found = torch.linalg.solve(gram, (rows.T @ (wanted - centre)).to(device, torch.float64)).T
    weight = found.to(rows.device, torch.float32)
    return weight, centre - weight @ mean
