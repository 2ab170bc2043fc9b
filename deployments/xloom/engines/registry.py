"""Backends by name: the entry-point group `xloom.backends`, or `module:Class`."""

from __future__ import annotations

from importlib.metadata import entry_points

from xloom.engines.base import LLMBackend
from xloom.protocol import XloomError

GROUP = "xloom.backends"
PREFERENCE = ("vllm", "transformers", "mistralrs")  # what `auto` tries, in this order


def names() -> list[str]:
    """The registered backends."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def backend_class(name: str) -> type[LLMBackend]:
    """The backend of this name; `auto` takes the first that can run here.

    Raises `XloomError`: unknown_backend, backend_missing.
    """
    if name == "auto":
        return _first_usable()
    found = _load(name)
    missing = found.missing()
    if missing is not None:
        raise XloomError("backend_missing", f"The backend {name!r} can't run here.", missing, 500)
    return found


def _first_usable() -> type[LLMBackend]:
    registered = names()
    reasons = []
    for name in [*PREFERENCE, *(other for other in registered if other not in PREFERENCE)]:
        if name not in registered:
            continue
        candidate = _load(name)
        missing = candidate.missing()
        if missing is None:
            return candidate
        reasons.append(f"{name}: {missing}")
    raise XloomError("backend_missing", "No backend can run here.", "; ".join(reasons) or "Install xloom[cpu].", 500)


def _load(name: str) -> type[LLMBackend]:
    if ":" in name:
        from importlib import import_module

        module, _, attribute = name.partition(":")
        try:
            loaded = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise XloomError("unknown_backend", f"The backend {name!r} can't be imported: {error}") from None
    else:
        points = [point for point in entry_points(group=GROUP) if point.name == name]
        if not points:
            raise XloomError(
                "unknown_backend", f"There is no backend {name!r}.", f"Use auto, or one of: {', '.join(names())}."
            )
        loaded = points[0].load()
    if not (isinstance(loaded, type) and issubclass(loaded, LLMBackend)):
        raise XloomError("unknown_backend", f"{name!r} is not an LLMBackend.")
    return loaded
