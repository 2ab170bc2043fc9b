"""AdamW over a few parameters with a warm-up and a cosine, and its state as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 4% of the steps, then a cosine down to a twentieth of the peak."""
    warm = max(1, steps // 25)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


class Optimiser:
    """One call of `step` a batch; `done` counts them."""

    def __init__(self, parameters: Sequence[nn.Parameter], steps: int, peak: float, weight_decay: float = 0.05) -> None:
        self.parameters = list(parameters)
        self._adam = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.95), weight_decay=weight_decay)
        self.steps, self.peak, self.done = steps, peak, 0

    def step(self, loss: Tensor) -> None:
        """Take the gradient of a loss, clip it to norm 1, and move the parameters."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate(self.done, self.steps, self.peak)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._adam.step()
        self.done += 1

    def state(self) -> dict[str, Tensor]:
        """The moments of each parameter."""
        found = {}
        for number, parameter in enumerate(self.parameters):
            for name in _MOMENTS:
                if name in self._adam.state[parameter]:
                    found[f"{number}.{name}"] = self._adam.state[parameter][name]
        return found

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on after `done` steps from what `state` gave."""
        for number, parameter in enumerate(self.parameters):
            moments = {name: state[f"{number}.{name}"].to(parameter.device) for name in _MOMENTS}
            self._adam.state[parameter] = {"step": torch.tensor(float(done)), **moments}
        self.done = done
