"""What differs between two boards, in lines a person can read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

OF_THE_SERVER = ("id", "version", "iteration")  # set by Grafana, or by its editor, on each save
_LABELS = ("title", "name", "refId")  # what an item of a list is known by
_LONG = 120  # characters of a value that are shown


def stripped(board: dict[str, Any]) -> dict[str, Any]:
    """A board without what is the server's."""
    return {key: value for key, value in board.items() if key not in OF_THE_SERVER}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each thing that came (+), went (-) or changed (~), with its path in the board."""
    return list(_compare("", stripped(old), stripped(new)))


def _compare(path: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        yield from _members(f"{path}." if path else "", "", old, new)
        return
    if isinstance(old, list) and isinstance(new, list):
        before, after = _labelled(old), _labelled(new)
        if before is not None and after is not None:
            yield from _members(f"{path}[", "]", before, after)
            common = [key for key in before if key in after]
            if common != [key for key in after if key in before]:
                yield f"~ {path}: in another order"
            return
    yield f"~ {path}: {_short(old)} -> {_short(new)}"


def _members(start: str, end: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in [*old, *(key for key in new if key not in old)]:
        path = f"{start}{key}{end}"
        if key not in new:
            yield f"- {path}{_value(old[key])}"
        elif key not in old:
            yield f"+ {path}{_value(new[key])}"
        else:
            yield from _compare(path, old[key], new[key])


def _labelled(items: list[Any]) -> dict[str, Any] | None:
    """Items by what they are known by, the second of a name as `name #2`; none when they are not mappings."""
    found: dict[str, Any] = {}
    for item in items:
        label = next((str(item[key]) for key in _LABELS if key in item), "") if isinstance(item, dict) else None
        if label is None:
            return None
        number = 1
        while (name := label if number == 1 else f"{label} #{number}") in found:
            number += 1
        found[name] = item
    return found


def _value(value: Any) -> str:
    """A scalar behind its path; a whole panel or list goes without saying."""
    return "" if isinstance(value, (dict, list)) else f": {_short(value)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"
