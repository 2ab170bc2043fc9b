"""What every kind of routing has: adapters stacked along the rank, and gates from somewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


class Source(Enum):
    """What a token's gates are made of."""

    HIDDEN = "hidden states of another row"  # a scaling sequence's, so that a token of a mixture costs two rows
    CONSTANT = "constants of the mixture or of the request"
    INPUT = "the linear's own input"


@dataclass(frozen=True)
class Routing(ABC):
    """The routing of a prepared mixture: M modules, K adapters."""

    kind: ClassVar[str]
    source: ClassVar[Source]

    num_adapters: int
    adapter_names: tuple[str, ...]
    modules: tuple[str, ...]  # Hugging Face names, in the order of `modules()`
    segments: tuple[tuple[tuple[int, int], ...], ...]  # per module: (adapter, rank), in stacking order

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, shared: Mapping[str, Any], options: Mapping[str, Any]) -> Self:
        """Of a prepared folder, on the CPU; `shared` are the fields above. Raises `KeyError` and the like."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same routing with its tensors on `device`."""

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether a token's gates at one module add up to 1 by themselves."""
        return False


def keep_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """`logits [..., K]` with all but the `top_k` largest of each row at minus infinity."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    values, indices = torch.topk(logits, top_k, dim=-1)
    return torch.full_like(logits, float("-inf")).scatter_(-1, indices, values)
