"""What the settings want in the store, in one form: adapters, bundles and mixtures of adapters."""

from __future__ import annotations

from dataclasses import dataclass

from xloom.protocol import NO_OVERRIDES, Blend, Overrides
from xloom.settings import Settings


@dataclass(frozen=True)
class Wanted:
    """An entry that the store is to have."""

    name: str
    source: str  # of a mixture of adapters: what it is of, for people
    kind: str | None
    overrides: Overrides = NO_OVERRIDES
    blend: Blend | None = None  # of a mixture of adapters
    verify: bool = False


def described(blend: Blend) -> str:
    """A blend's source, for people."""
    less = f", less {', '.join(blend.subtract)}" if blend.subtract else ""
    return f"{blend.routing}: {', '.join(blend.adapters)}{less}"


def wanted(settings: Settings) -> list[Wanted]:
    """All that the settings name, in their order."""
    found = [Wanted(each.name, each.location, "lora", verify=each.verify) for each in settings.adapters]
    for bundle in settings.xlora:
        # Listed there, a bundle is X-LoRA or a learned linear router: its folder says.
        found.append(Wanted(bundle.name, bundle.location, "xlora", Overrides.of(bundle), verify=bundle.verify))
    for mixture in settings.mixtures:
        adapters, subtract = settings.sources_of(mixture.adapters), settings.sources_of(mixture.subtract)
        blend = Blend(mixture.routing, adapters, mixture.weights, mixture.top_k, mixture.temperature, subtract)
        found.append(Wanted(mixture.name, described(blend), mixture.routing, blend=blend, verify=mixture.verify))
    return found
