"""What vLLM's front end says of its own first tokens: sums and counts of its Prometheus histograms."""

from __future__ import annotations

import urllib.error
import urllib.request

# Histograms of vllm.v1.metrics.loggers.PrometheusStatLogger, vLLM 0.32; seconds.
FIRST_TOKEN = "vllm:time_to_first_token_seconds"  # from a request's arrival in the front end
ENGINE = ("vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds")

Counts = dict[str, tuple[float, float]]


def first_tokens(url: str) -> Counts:
    """Sum and count of each histogram so far; empty where the server has none."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError):
        return {}
    return {name: (_value(text, f"{name}_sum"), _value(text, f"{name}_count")) for name in (FIRST_TOKEN, *ENGINE)}


def means(before: Counts, after: Counts) -> dict[str, float]:
    """Mean milliseconds of each histogram's new observations."""
    found = {}
    for name, (total, count) in after.items():
        old_total, old_count = before.get(name, (0.0, 0.0))
        if count > old_count:
            found[name] = 1e3 * (total - old_total) / (count - old_count)
    return found


def _value(text: str, series: str) -> float:
    lines = (line for line in text.splitlines() if line.startswith((f"{series}{{", f"{series} ")))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
