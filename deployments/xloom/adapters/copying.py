"""A file of a source, copied piece by piece: its safetensors header is checked before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from xloom.adapters.limits import Budget
from xloom.protocol import XloomError

_PIECE = 2**20  # bytes
_MOST_HEADER = 16 * 2**20  # bytes: some hundred for each tensor. It is read whole, as JSON
_MOST_JSON = 64 * 2**20  # bytes: a tokenizer's, which is copied and no more
_MOST_READ = 4 * 2**20  # bytes: what is read whole, later on
_READ = ("adapter_config.json", "xlora_config.json", "router_config.json", ".index.json")


class Readable(Protocol):
    """A file of a source, open for reading."""

    def read(self, size: int, /) -> bytes: ...


def copy(reader: Readable, target: Path, size: int | None, budget: Budget) -> None:
    """Copy to `target`; `size` in bytes is what the source says, None if nothing. Raises `XloomError`."""
    budget.heard()  # of a source that was given up nothing more is written
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        start, whole = b"", None  # bytes of the file, by its header
        if target.suffix == ".safetensors":
            start = _pieces(reader, 8, budget)
            length = _header_length(start, target, budget)
            start += _pieces(reader, length, budget)
            whole = _whole_size(start, length, target, budget)
            if size not in (None, whole):
                raise _broken(target, budget, f"its header speaks of {whole} bytes, and it has {size}")
            budget.expect(whole - len(start))
        most = whole or (_MOST_READ if target.name.endswith(_READ) else _MOST_JSON)
        out.write(start)
        copied = len(start)
        while piece := reader.read(_PIECE):
            budget.take(len(piece))
            copied += len(piece)
            if copied > most and whole is None:
                raise budget.too_large(f"{target.name} of more than {most} bytes")
            if copied > most:
                raise _broken(target, budget, f"its header speaks of {whole} bytes, and more come")
            out.write(piece)
    if whole is not None and copied < whole:
        raise _broken(target, budget, f"its header speaks of {whole} bytes, and it has {copied}")


def _pieces(reader: Readable, count: int, budget: Budget) -> bytes:
    """Up to `count` bytes."""
    found = bytearray()
    while len(found) < count and (piece := reader.read(min(_PIECE, count - len(found)))):
        budget.take(len(piece))
        found += piece
    return bytes(found)


def _header_length(start: bytes, target: Path, budget: Budget) -> int:
    if start == b"version ":
        raise _broken(target, budget, "it is a Git LFS pointer: fetch the file itself (git lfs pull)")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(_MOST_HEADER, budget.limits.size):
        raise _broken(target, budget, "it is not a safetensors file")
    return length


def _whole_size(start: bytes, length: int, target: Path, budget: Budget) -> int:
    """Bytes of the file by its header."""
    try:
        header = json.loads(start[8:])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        most = max(ends, default=0)
        if not isinstance(most, int) or most < 0:
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise _broken(target, budget, "its header can't be read") from None
    return 8 + length + most


def _broken(target: Path, budget: Budget, why: str) -> XloomError:
    return XloomError(
        "broken_adapter", f"{target.name} of {budget.source!r}: {why}.", "Save the adapter again, or copy it again."
    )
