"""Kinds of routing by name, and what a prepared folder says of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xloom.mixtures.options import FORMAT, XLORA_FILE
from xloom.mixtures.routing.arrow import ArrowRouting
from xloom.mixtures.routing.base import Routing
from xloom.mixtures.routing.fixed import FixedRouting
from xloom.mixtures.routing.linear import LinearRouting
from xloom.mixtures.routing.xlora import XLoraRouting
from xloom.protocol import XloomError

KINDS: dict[str, type[Routing]] = {
    kind.kind: kind for kind in (XLoraRouting, ArrowRouting, FixedRouting, LinearRouting)
}


def read_description(folder: Path) -> tuple[type[Routing], dict[str, Any]] | None:
    """The kind of a prepared mixture, and the description of it; None of a plain adapter. Raises `XloomError`."""
    if not (folder / XLORA_FILE).is_file():
        return None
    try:
        data = json.loads((folder / XLORA_FILE).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, not {FORMAT}")
        return KINDS[data.get("kind", XLoraRouting.kind)], data
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _broken(folder, error) from error


def load_routing(folder: Path) -> Routing:
    """Read the routing of a prepared mixture, on the CPU. Raises `XloomError` (broken_bundle)."""
    found = read_description(folder)
    if found is None:
        raise _broken(folder, FileNotFoundError(XLORA_FILE))
    kind, data = found
    try:
        shared = {
            "num_adapters": data["num_adapters"],
            "adapter_names": tuple(data["adapter_names"]),
            "modules": tuple(data["modules"]),
            "segments": tuple(tuple((k, rank) for k, rank in segment) for segment in data["segments"]),
        }
        return kind.read(folder, shared, data["routing"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(folder, error) from error


def _broken(folder: Path, error: Exception) -> XloomError:
    message = f"{folder} is not a prepared mixture: {error!r}."
    return XloomError("broken_bundle", message, "Add it to the store again.", 500)
