"""The loop that trains a router: steps with a loss, a checkpoint now and then, and how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from xloom.compose.checkpoint import Checkpoint, Progress
from xloom.compose.learned import LearnedRouter, parameters_of
from xloom.compose.optimiser import Optimiser
from xloom.protocol import XloomError

SAVE_S = 30.0  # between two checkpoints
_SMOOTH = 0.95  # of the loss that is shown


@dataclass(frozen=True)
class Training:
    """Steps of one kind; `loss` gives that of a step, by its number."""

    name: str
    steps: int
    peak: float  # learning rate
    loss: Callable[[int], Tensor]


@dataclass(frozen=True)
class Told:
    """What is told after each step."""

    training: str
    step: int
    steps: int
    loss: float  # smoothed
    left_s: float

    def __str__(self) -> str:
        left = f"{self.left_s / 60:.0f} min" if self.left_s >= 90 else f"{self.left_s:.0f} s"
        return f"{self.training}, step {self.step} of {self.steps}, loss {self.loss:.4f}, {left} left"


def train(
    router: LearnedRouter,
    training: Training,
    checkpoint: Checkpoint | None = None,
    told: Callable[[Told], object] = lambda step: None,
    save_s: float = SAVE_S,
) -> None:
    """Train a router in place, from its checkpoint on if there is one; interrupted, it leaves one (KeyboardInterrupt).

    Raises `XloomError`: diverged, checkpoint_unusable.
    """
    optimiser = Optimiser(parameters_of(router), training.steps, training.peak, weight_decay=0.0)
    if (found := checkpoint.load() if checkpoint else None) is not None:
        router.load_state_dict(found.router)
        if found.done:
            optimiser.load(found.optimiser, found.done)

    def save() -> None:
        if checkpoint:
            checkpoint.save(Progress(optimiser.done, router.state_dict(), optimiser.state()))

    began = saved = time.monotonic()
    first, shown, whole = optimiser.done, math.nan, True
    try:
        while optimiser.done < training.steps:
            loss = training.loss(optimiser.done)
            value = loss.item()
            if not math.isfinite(value):
                message = f"The loss of {training.name} became {value} at step {optimiser.done + 1}."
                raise XloomError("diverged", message, "Lower the learning rate (--learning-rate).")
            whole = False
            optimiser.step(loss)
            whole = True
            shown = value if math.isnan(shown) else _SMOOTH * shown + (1 - _SMOOTH) * value
            now = time.monotonic()
            left = (now - began) / (optimiser.done - first) * (training.steps - optimiser.done)
            told(Told(training.name, optimiser.done, training.steps, shown, left))
            if now - saved >= save_s:
                saved = now
                save()
    except KeyboardInterrupt:
        if whole:  # else in mid-step: the checkpoint before stands
            save()
        raise
    save()  # its judgement may yet be interrupted
