"""What a mixture that is asked for at run time is made of: adapters that are served, or sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from xloom.adapters.manifest import Entry
from xloom.protocol import Blend, XloomError, name_of_source, some_of


def blend_of(options: Blend, adapters: Sequence[str], entries: Sequence[Entry], subtract: Sequence[str] = ()) -> Blend:
    """A blend with these options, of adapters that are served, as the store has them, and of sources, which it reads.

    Raises `XloomError`: invalid_mixture, adapter_not_found.
    """
    served = {entry.name: entry for entry in entries}
    mixed, own = _named(adapters, served)
    general, others = _named(subtract, served)
    if odd := [name for name in general if general[name] != mixed.get(name, general[name])]:
        raise _invalid(f"two of its adapters would be called {odd[0]!r}")
    return msgspec.structs.replace(options, adapters=mixed, subtract=general, generations=own | others)


def _named(wanted: Sequence[str], served: Mapping[str, Entry]) -> tuple[dict[str, str], dict[str, str]]:
    """Name in the mixture -> source, and -> generation of those that are served. As in settings, a source goes by its
    last part.
    """
    adapters: dict[str, str] = {}
    generations: dict[str, str] = {}
    for each in wanted:
        entry = served.get(each)
        if entry is not None and entry.ref.is_mixture:
            raise _invalid(f"{each!r} is a mixture itself")
        name = each if entry is not None else name_of_source(each)
        if entry is None and "/" not in each:
            there = some_of([name for name, entry in served.items() if not entry.ref.is_mixture]) or "none"
            message = f"There is no adapter {each[:80]!r}."
            raise XloomError("adapter_not_found", message, f"Adapters are: {there}. Or give a source.", 404)
        if name in adapters:
            raise _invalid(f"two of its adapters would be called {name!r}")
        adapters[name] = each if entry is None else entry.source
        if entry is not None:
            generations[name] = entry.generation
    return adapters, generations


def _invalid(what: str) -> XloomError:
    return XloomError("invalid_mixture", f"The mixture can't be made: {what}.", "See docs/mixtures.md.")
