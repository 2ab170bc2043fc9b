"""`fixed`: gates that are constants, of the mixture or of the request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from xloom.mixtures.routing.base import Routing, Source
from xloom.protocol import XloomError

LARGEST = 100.0  # by size: what adapters add is held to be finite with such a weight


@dataclass(frozen=True)
class FixedRouting(Routing):
    """A weight for each adapter, the same at every token and module."""

    kind: ClassVar[str] = "fixed"
    source: ClassVar[Source] = Source.CONSTANT

    weights: tuple[float, ...]  # K

    @classmethod
    def read(cls, folder: Path, shared: Mapping[str, Any], options: Mapping[str, Any]) -> Self:
        return cls(**shared, weights=tuple(map(float, options["weights"])))

    def to(self, device: torch.device | str) -> Self:
        return self

    def gates(self, weights: Sequence[float] | None = None) -> Tensor:
        """The gates `[M, K]`, float32, on the CPU; with a request's own weights `[K]` where it has some."""
        row = torch.tensor(self.weights if weights is None else weights, dtype=torch.float32)
        return row.expand(len(self.modules), -1)


def checked_weights(given: Mapping[str, float], names: Sequence[str], mixture: str) -> tuple[float, ...]:
    """Weights in the order of a mixture's adapters; those not given are 0. Negative ones are allowed, and any sum.

    Raises `XloomError` (invalid_weights): none, of an adapter the mixture does not have, not a number of moderate size.
    """
    if odd := [name for name in given if name not in names]:
        message = f"The mixture {mixture!r} has no adapter {str(odd[0])[:80]!r}."
        raise XloomError("invalid_weights", message, f"Its adapters are {', '.join(names)}.")
    if not given:
        raise XloomError("invalid_weights", f"The weights of {mixture!r} are empty.", f"Name {' or '.join(names)}.")
    for name, weight in given.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and abs(weight) <= LARGEST):
            message = f"The weight of {name!r} in {mixture!r} is {str(weight)[:40]}."
            raise XloomError("invalid_weights", message, f"Give a number from {-LARGEST:g} to {LARGEST:g}.")
    return tuple(float(given.get(name, 0.0)) for name in names)
