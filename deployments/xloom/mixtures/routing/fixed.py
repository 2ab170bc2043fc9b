"""`fixed`: gates that are constants, of the mixture or of the request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from xloom.mixtures.routing.base import Routing, Source


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
