"""A request's weights for the adapters of a mixture, held against what a mixture may have. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from xloom.protocol import XloomError, some_of

LARGEST = 100.0  # by size: what adapters add is held to be finite with such a weight
MOST_ADAPTERS = 32  # of a mixture: one block of the GPU's kernel


def checked_weights(given: Mapping[str, float], names: Sequence[str], mixture: str) -> tuple[float, ...]:
    """Weights in the order of a mixture's adapters; those not given are 0. Negative ones are allowed, and any sum.

    Raises `XloomError` (invalid_weights): none, of an adapter the mixture does not have, not a number of moderate size.
    """
    if odd := [name for name in given if name not in names]:
        message = f"The mixture {mixture!r} has no adapter {str(odd[0])[:80]!r}."
        raise XloomError("invalid_weights", message, f"Its adapters are {', '.join(names)}.")
    if not given:
        raise XloomError("invalid_weights", f"The weights of {mixture!r} are empty.", f"Name {' or '.join(names)}.")
    check_numbers(given)
    return tuple(float(given.get(name, 0.0)) for name in names)


def check_numbers(given: Mapping[str, float]) -> None:
    """Raise `XloomError` (invalid_weights) for a weight that is not a number of moderate size."""
    for name, weight in given.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and abs(weight) <= LARGEST):
            message = f"The weight of {str(name)[:80]!r} is {str(weight)[:40]}."
            raise XloomError("invalid_weights", message, f"Give a number from {-LARGEST:g} to {LARGEST:g}.")


def check_set(given: Mapping[str, float], served: Sequence[str]) -> None:
    """Hold the weights of a request on the base model's name against the adapters served. Raises as above."""
    if not given:
        raise XloomError("invalid_weights", "The weights are empty.", 'Send {"mixture": {"adapter": 0.5}}.')
    if len(given) > MOST_ADAPTERS:
        message = f"{len(given)} adapters are more than one request mixes."
        raise XloomError("invalid_weights", message, f"Name {MOST_ADAPTERS} or fewer.")
    if odd := [name for name in given if name not in served]:
        there = some_of(served) or "none"
        message = f"There is no adapter {str(odd[0])[:80]!r} to mix."
        raise XloomError("invalid_weights", message, f"Adapters are: {there}. Mixtures can't be mixed.")
    check_numbers(given)
