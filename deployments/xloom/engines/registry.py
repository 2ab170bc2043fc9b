"""Backends by name: the entry-point group `xloom.backends`, or `module:Class`."""

from __future__ import annotations

from importlib.metadata import entry_points

from xloom.engines.base import LLMBackend
from xloom.protocol import XloomError
from xloom.settings import Settings

GROUP = "xloom.backends"
PREFERENCE = ("vllm", "transformers", "mistralrs")  # what `auto` tries, in this order


def names() -> list[str]:
    """The registered backends."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def backend_for(settings: Settings) -> type[LLMBackend]:
    """The backend of a deployment; `auto` takes the first that can run here and do what is asked.

    Raises `XloomError`: unknown_backend, backend_missing, unsupported_by_backend.
    """
    wanted = settings.engine.backend
    if wanted != "auto":
        found = load_backend(wanted)
        missing = found.missing()
        if missing is not None:
            raise XloomError("backend_missing", f"The backend {wanted!r} can't run here.", missing, 500)
        _refuse(wanted, found, settings)
        return found
    usable: dict[str, type[LLMBackend]] = {}
    reasons = []
    for name in ordered_names():
        candidate = load_backend(name)
        missing = candidate.missing()
        if missing is None:
            usable[name] = candidate
        else:
            reasons.append(f"{name}: {missing}")
    for candidate in usable.values():
        if not lacking(candidate, settings):
            return candidate
    for name, candidate in usable.items():
        _refuse(name, candidate, settings)
    raise XloomError("backend_missing", "No backend can run here.", "; ".join(reasons) or "Install xloom[cpu].", 500)


def ordered_names() -> list[str]:
    """The registered backends, in the order `auto` tries them."""
    registered = names()
    return [
        *(name for name in PREFERENCE if name in registered),
        *(name for name in registered if name not in PREFERENCE),
    ]


def lacking(backend: type[LLMBackend], settings: Settings) -> list[str]:
    """What a deployment asks for that a backend can't do on its device here."""
    can, device = backend.capabilities(), backend.device()
    found = []
    if (settings.xlora or settings.mixtures) and not settings.xlora_enabled:
        found.append("the bundles under xlora and the mixtures with engine.enable_xlora: false")
    if settings.xlora_enabled and device not in can.xlora:
        found.append(f"X-LoRA on {device}" if can.xlora else "X-LoRA")
    if any(bundle.routing_passes == 1 for bundle in settings.xlora) and not can.single_pass:
        found.append("X-LoRA routed in one pass")
    isq = settings.isq
    if isq is not None:
        cases = can.isq.get(device, frozenset())
        wanted = (2, 4, 8) if isq.bits == "auto" else (isq.bits,)
        if not any((isq.method, bits) in cases for bits in wanted):
            found.append(f"isq {isq.method} at {isq.bits} bits on {device}")
    return found


def _refuse(name: str, backend: type[LLMBackend], settings: Settings) -> None:
    """Raise `XloomError` (unsupported_by_backend) when a backend can't do what is asked, naming what can."""
    wrong = lacking(backend, settings)
    if not wrong:
        return
    others = [other for other in ordered_names() if other != name and not lacking(load_backend(other), settings)]
    cures = [f"Set engine.backend to {' or '.join(others)}."] if others else []
    if settings.isq is not None and any(each.startswith("isq") for each in wrong):
        cases = backend.capabilities().isq.get(backend.device(), frozenset())
        known = ", ".join(f"{method} at {bits}" for method, bits in sorted(cases)) or "none"
        cures.append(f"{name} on {backend.device()} takes: {known}. See xloom doctor --isq.")
    cure = " ".join(cures) or "No registered backend can: leave it out."
    raise XloomError("unsupported_by_backend", f"The backend {name!r} can't do {' and '.join(wrong)}.", cure)


def load_backend(name: str) -> type[LLMBackend]:
    """The class of a name, whether or not it can run here. Raises `XloomError` (unknown_backend)."""
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
