"""Gates of tokens that mixtures' requests have not computed yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d  # pinned and asynchronous on a GPU; vLLM 0.32


@dataclass
class _Part:
    """Gates of consecutive tokens: `count` rows from `first` of `source [num_rows, M, K]`, or its only row."""

    position: int  # of the first token in its sequence
    source: Tensor
    first: int
    count: int

    def row(self, skipped: int) -> int:
        """The row of the token that comes after so many."""
        return self.first if self.source.shape[0] == 1 else self.first + skipped


class Span(NamedTuple):
    """Consecutive tokens of one sequence in a batch."""

    request_id: str  # a mixture's request
    position: int
    num_tokens: int
    constant: Tensor | None = None  # [M, K]: gates that are no token's own


class GateStore:
    """Gates by mixture's request, each kept until it is used. Tensors are shared, not copied, as they come."""

    def __init__(self) -> None:
        self._parts: dict[str, deque[_Part]] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def put(self, request_id: str, position: int, gates: Tensor, first: int, count: int) -> None:
        """Keep `gates[first : first + count]`, of tokens from `position` on; a single row is that of all `count`.

        Raises `RuntimeError` on a gap.
        """
        parts = self._parts.setdefault(request_id, deque())
        if parts and parts[-1].position + parts[-1].count != position:
            end = parts[-1].position + parts[-1].count
            raise RuntimeError(f"gates of {request_id} come for token {position}, and {end} was next")
        parts.append(_Part(position, gates, first, count))

    def drop(self, request_id: str) -> None:
        """Forget a request's gates: it ended, or starts again."""
        self._parts.pop(request_id, None)

    def take(self, spans: Sequence[Span]) -> Tensor:
        """The gates `[num_rows, M, K]` of these tokens, in their order; each is given once.

        Raises `RuntimeError` when one is missing: a mixture's token is never computed without its gates.
        """
        pieces: list[tuple[Tensor, int, int]] = []  # source, first, count
        for span in spans:
            found = self._use(span) if span.constant is None else [(span.constant[None], 0, span.num_tokens)]
            for source, first, count in found:
                if pieces and pieces[-1][0] is source and pieces[-1][1] + pieces[-1][2] == first:
                    first, count = pieces[-1][1], pieces.pop()[2] + count
                pieces.append((source, first, count))
        return _gathered(pieces)

    def _use(self, span: Span) -> list[tuple[Tensor, int, int]]:
        parts = self._parts.get(span.request_id)
        position, missing = span.position, span.num_tokens
        found = []
        while missing and parts:
            part = parts[0]
            if not part.position <= position < part.position + part.count:
                break
            skipped = position - part.position
            used = min(missing, part.count - skipped)
            found.append((part.source, part.row(skipped), used))
            position, missing = position + used, missing - used
            if skipped + used == part.count:
                parts.popleft()
            else:
                parts[0] = _Part(position, part.source, part.row(skipped + used), part.count - skipped - used)
        if missing:
            raise RuntimeError(f"no gates for token {position} of {span.request_id}")
        if not parts:
            del self._parts[span.request_id]
        return found


def _gathered(pieces: Sequence[tuple[Tensor, int, int]]) -> Tensor:
    """One tensor of all pieces, with as few operations as they allow."""
    if len(pieces) == 1:
        return _rows(*pieces[0])
    source = pieces[0][0]
    if all(each is source and count == 1 for each, _, count in pieces):  # decoding, in another order
        index = np.array([first for _, first, _ in pieces], dtype=np.int64)
        return source.index_select(0, async_tensor_h2d(index, device=source.device))
    return torch.cat([_rows(*piece) for piece in pieces])


def _rows(source: Tensor, first: int, count: int) -> Tensor:
    if source.shape[0] == 1 and count > 1:  # constant gates
        return source.expand(count, -1, -1)
    return source[first : first + count]
