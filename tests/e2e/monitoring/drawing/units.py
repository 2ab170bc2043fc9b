"""Values as Grafana writes them, in the units the boards use, and round numbers for an axis."""

from __future__ import annotations

import math
from collections.abc import Iterator

_RATES = {"reqps": " req/s", "ops": " ops/s", "cps": " c/s", "wps": " wr/s", "rps": " rd/s"}
_BYTES = {"bytes": "B", "binBps": "B/s", "mbytes": "B"}
_DECIMAL_BYTES = {"decbytes": "B", "Bps": "B/s"}
_TIMES = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}
_TIME_STEPS = ((86400.0, " d"), (3600.0, " h"), (60.0, " min"), (1.0, " s"), (1e-3, " ms"), (1e-6, " µs"))
KNOWN = {"short", "none", "percent", "percentunit", "bool_yes_no", *_RATES, *_BYTES, *_DECIMAL_BYTES, *_TIMES}


def written(value: float, unit: str) -> str:
    """A value with its unit. Raises `ValueError` for a unit that is not Grafana's, or not used so far."""
    if not (unit in KNOWN or unit.startswith(("suffix:", "prefix:", "si:"))):
        raise ValueError(f"unit {unit!r}")
    if math.isnan(value):
        return "NaN"
    if unit in _TIMES:
        return _duration(value * _TIMES[unit])
    if unit in ("percent", "percentunit"):
        return f"{_plain(value * (100 if unit == 'percentunit' else 1))}%"
    if unit in _BYTES:
        return _scaled(
            value * (2**20 if unit == "mbytes" else 1), 1024, (" ", " Ki", " Mi", " Gi", " Ti"), _BYTES[unit]
        )
    if unit in _DECIMAL_BYTES:
        return _scaled(value, 1000, (" ", " k", " M", " G", " T"), _DECIMAL_BYTES[unit])
    if unit.startswith("prefix:"):
        return unit.removeprefix("prefix:") + _plain(value)
    suffix = _RATES.get(unit, "")
    for prefix in ("suffix:", "si:"):
        if unit.startswith(prefix):
            suffix = f" {unit.removeprefix(prefix).strip()}"
    scales = unit == "short" or unit in _RATES
    number = _scaled(value, 1000, ("", " K", " Mil", " Bil", " Tri"), "") if scales else _plain(value)
    return number + suffix


def _plain(value: float) -> str:
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if abs(value) < 100 else 0
    return f"{value:,.{min(digits, 6)}f}".rstrip("0").rstrip(".") if digits else f"{value:,.0f}"


def _scaled(value: float, base: int, prefixes: tuple[str, ...], unit: str) -> str:
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value /= base
        power += 1
    return f"{_plain(value)}{prefixes[power]}{unit}"


def _duration(seconds: float) -> str:
    for size, name in _TIME_STEPS:
        if abs(seconds) >= size:
            return f"{_plain(seconds / size)}{name}"
    return f"{_plain(seconds / 1e-6)} µs" if seconds else "0 s"


def ticks(lowest: float, highest: float, count: int = 4, base: int = 10) -> list[float]:
    """Round numbers from at or below `lowest` to at or above `highest`."""
    span = highest - lowest
    if span <= 0:
        span = abs(highest) or 1.0
    raw = span / count
    size = float(base) ** math.floor(math.log(raw, base))
    steps = (1, 2, 5, 10) if base == 10 else tuple(2**power for power in range(11))
    step = next(size * factor for factor in steps if size * factor >= raw * 0.999)
    return list(_multiples(math.floor(lowest / step + 1e-9), step, highest))


def _multiples(first: int, step: float, highest: float) -> Iterator[float]:
    number = first
    while True:
        yield number * step
        if number * step >= highest - 1e-9 * step:
            return
        number += 1
