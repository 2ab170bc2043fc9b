"""What the gates of one answer were: sums as its tokens come, and each token's where the client asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xloom.protocol import Gates
from xloom.router.return_mixture import Detail

DIGITS = 5  # of a gate in JSON

Array = np.ndarray[Any, Any]


class MixtureRecord:
    """Of one request, over all replicas that had it."""

    def __init__(self, routing: str, prompt_tokens: int, detail: Detail | None) -> None:
        """`prompt_tokens` of the client's prompt, at least one."""
        self.routing, self.prompt_tokens, self.detail = routing, prompt_tokens, detail
        self.adapters: list[str] = []
        self.prompt = b""
        self.computed = 0  # tokens of the prompt that `prompt` is the mean of
        self.tokens: list[bytes] = []  # a token each, as `Gates` has them
        self.layers: list[bytes] = []
        self._sums: Array | None = None  # [K]
        self._count = 0

    def add(self, gates: Gates) -> Mixed:
        """A chunk came. What there is with it: more may have come before anybody looks."""
        if gates.adapters and not self.adapters:  # another replica, later, has tokens of the answer for its prompt
            self.adapters, self.prompt, self.computed = gates.adapters, gates.prompt, gates.prompt_tokens
        rows = np.frombuffer(gates.tokens, dtype="<f4").reshape(-1, len(self.adapters))
        total = rows.sum(0, dtype=np.float64)
        self._sums = total if self._sums is None else self._sums + total
        self._count += len(rows)
        if self.detail is not None:
            self.tokens += _parts(gates.tokens, len(rows))
        if self.detail == "layers":
            self.layers += _parts(gates.layers, len(rows))
        return Mixed(self, self._sums, self._count)


@dataclass(frozen=True)
class Mixed:
    """The gates of an answer up to one of its tokens."""

    record: MixtureRecord
    sums: Array  # [K]
    count: int  # tokens

    def told(self, name: str) -> dict[str, Any]:
        """The `mixture` of an answer by the model of this name."""
        record = self.record
        names = record.adapters
        prompt = None
        if record.computed:
            prompt = dict(zip(names, _rounded(np.frombuffer(record.prompt, dtype="<f4")), strict=True))
        told: dict[str, Any] = {
            "name": name,
            "routing": record.routing,
            "adapters": names,
            "gates": dict(zip(names, _rounded(self.sums / self.count), strict=True)),
            "prompt_gates": prompt,
            "tokens": self.count,
            "prompt_tokens": record.computed,
            "cached_prompt_tokens": record.prompt_tokens - 1 - record.computed,
        }
        if record.detail is not None:
            told["token_gates"] = _rounded(_array(record.tokens[: self.count], self.count, len(names)))
        if record.detail == "layers":
            rows = _array(record.layers[: self.count], self.count, -1, len(names))
            layers = _rounded(rows)
            if len(rows) and np.isnan(rows).any():
                bare = np.isnan(rows[0, :, 0])
                layers = [[None if no else row for no, row in zip(bare, token, strict=True)] for token in layers]
            told["layer_gates"] = layers
        return told


def _parts(data: bytes, count: int) -> list[bytes]:
    size = len(data) // count
    return [data[place * size : (place + 1) * size] for place in range(count)]


def _array(parts: list[bytes], *shape: int) -> Array:
    return np.frombuffer(b"".join(parts), dtype="<f4").reshape(shape)


def _rounded(values: Array) -> Any:
    """As lists; in float64, whose shortest decimals are those it was rounded to."""
    return np.round(values.astype(np.float64), DIGITS).tolist()
