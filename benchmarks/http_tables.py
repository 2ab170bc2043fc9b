"""The tables of the HTTP measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .client import Load
from .metrics import ENGINE, FIRST_TOKEN
from .processes import MIB
from .servers import KINDS
from .side_by_side import Side, SideBySide
from .tables import Table

# In the order in which a request meets them.
PARTS = (
    "client", "API server", "HTTP proxy", "router", "replica", "engine core", "worker",
    "adapter store", "Serve controller", "Ray's own", "launcher", "other",
)  # fmt: skip


def tables(compared: Sequence[SideBySide], loads: Sequence[Load], rounds: int, missed: Sequence[str]) -> list[Table]:
    """All tables, the comparison first."""
    made = [throughput(compared, loads, rounds, missed), first_token(compared, loads)]
    counts = [load.concurrent for load in loads]
    made.append(processor(compared, max(counts)))
    if 1 in counts:
        made.append(first_token_split(compared))
    made.append(memory(compared))
    return made


def throughput(compared: Sequence[SideBySide], loads: Sequence[Load], rounds: int, missed: Sequence[str]) -> Table:
    """Output tokens a second, and what share of the baseline's that is."""
    rows = []
    for load in loads:
        for both in compared:
            ratios = both.ratios(load.concurrent)
            mark = " (disturbed)" if both.disturbed(load.concurrent) else ""
            rows.append(
                [
                    f"{load.concurrent}, {both.rival.name}",
                    f"{both.baseline.median(load.concurrent, lambda sample: sample.run.throughput):,.0f}",
                    f"{both.rival.median(load.concurrent, lambda sample: sample.run.throughput):,.0f}",
                    f"{both.ratio(load.concurrent):.2f}",
                    f"{min(ratios):.2f} to {max(ratios):.2f}",
                    f"{both.other_cores(load.concurrent):.2f}{mark}",
                ]
            )
    sizes = ", ".join(f"{load.requests} requests at {load.concurrent}" for load in loads)
    legend = "; ".join(f"{both.rival.name}: {KINDS[both.rival.name].text}" for both in compared)
    notes = (
        f"Medians of {rounds} alternating rounds, {sizes}; {loads[0].input_tokens} random prompt tokens and "
        f"{loads[0].output_tokens} output tokens each, streamed. {legend}. The last column is "
        "the most that any run had beside it of processor time spent by others: a row marked as disturbed says nothing "
        f"about the servers. {' '.join(missed)}"
    )
    columns = [
        "concurrent, server",
        "bare vLLM beside it",
        "server",
        "ratio",
        "ratio, least to most",
        "cores others used",
    ]
    return {"title": "HTTP throughput (output tokens/s)", "columns": columns, "rows": rows, "notes": notes.strip()}


def first_token(compared: Sequence[SideBySide], loads: Sequence[Load]) -> Table:
    """Latencies the client saw."""
    rows = []
    for load in loads:
        for both in compared:
            sides = (both.baseline, both.rival)
            firsts = [side.median(load.concurrent, lambda sample: sample.run.ttft) for side in sides]
            between = [side.median(load.concurrent, lambda sample: sample.run.tpot) for side in sides]
            rows.append(
                [
                    f"{load.concurrent}, {both.rival.name}",
                    f"{firsts[0]:.1f}",
                    f"{firsts[1]:.1f}",
                    f"{both.added_first_token(load.concurrent):+.1f}",
                    f"{between[0]:.2f}",
                    f"{between[1]:.2f}",
                ]
            )
    columns = ["concurrent, server", "first token, vLLM", "server", "added", "per further token, vLLM", "server"]
    notes = (
        "Medians over requests, then over rounds. Many at a time start together, so their first tokens wait in line."
    )
    return {"title": "Time to first token (ms)", "columns": columns, "rows": rows, "notes": notes}


def processor(compared: Sequence[SideBySide], concurrent: int) -> Table:
    """Microseconds of processor time per output token, and idle load."""
    sides = [compared[0].baseline, *(both.rival for both in compared)]
    spent = [side.cpu_per_token(concurrent) for side in sides]
    rows = _by_part(spent, lambda value: f"{value:.1f}")
    rows.append(["sum", *(f"{sum(each.values()):.1f}" for each in spent)])
    rows.append(["idle, share of a core", *(f"{sum(side.idle.values()):.1%}" for side in sides)])
    return {
        "title": f"Where the processor time of an output token goes, at {concurrent} concurrent (µs)",
        "columns": ["process", *(side.name for side in sides)],
        "rows": rows,
        "notes": "User and system time of each server's processes and of the client while the load ran, "
        "divided by output tokens; medians of the rounds. Threads of the worker that spin while they wait count "
        "as time. The last line: what the server uses with nothing to do; it was alive while the other was loaded.",
    }


def first_token_split(compared: Sequence[SideBySide]) -> Table:
    """Mean time to first token at one client, by stage."""
    stages = ("client to front end and back", "front end", "engine, and the way to it")
    sides = [compared[0].baseline, *(both.rival for both in compared)]
    columns = [(side, _stages(side)) for side in sides]
    shown = [(side, found) for side, found in columns if found is not None]
    rows: list[list[str]] = [
        [stage, *(f"{found[index]:.2f}" for _, found in shown)] for index, stage in enumerate(stages)
    ]
    rows.append(["sum", *(f"{sum(found):.2f}" for _, found in shown)])
    return {
        "title": "Where the time to the first token goes, one client (mean ms)",
        "columns": ["stage", *(side.name for side, _ in shown)],
        "rows": rows,
        "notes": "From the client's figures and vLLM's own metrics. In xloom the third stage holds the connection "
        "between router and replica, both ways; in bare vLLM the time in the engine alone. Servers without these "
        "metrics are left out.",
    }


def _stages(side: Side) -> tuple[float, float, float] | None:
    samples = side.samples[1]
    if not all(FIRST_TOKEN in sample.first_tokens for sample in samples):
        return None
    client = side.median(1, lambda sample: sample.run.ttft_mean)
    front = side.median(1, lambda sample: sample.first_tokens[FIRST_TOKEN])
    engine = side.median(1, lambda sample: sum(sample.first_tokens.get(name, 0.0) for name in ENGINE))
    return client - front, front - engine, engine


def memory(compared: Sequence[SideBySide]) -> Table:
    """Peak and proportional memory by part."""
    sides = [compared[0].baseline, *(both.rival for both in compared)]
    rows = []
    for part in PARTS:
        found = [side.memory.get(part) for side in sides]
        if any(found):
            rows.append(
                [part, *(f"{each.peak / MIB:,.0f} / {each.proportional / MIB:,.0f}" if each else "" for each in found)]
            )
    sums = [
        (sum(m.peak for m in side.memory.values()), sum(m.proportional for m in side.memory.values())) for side in sides
    ]
    rows.append(["sum", *(f"{peak / MIB:,.0f} / {proportional / MIB:,.0f}" for peak, proportional in sums)])
    return {
        "title": "Memory by process (MiB): peak resident / proportional share at the end",
        "columns": ["process", *(side.name for side in sides)],
        "rows": rows,
        "notes": "VmHWM and PSS of Linux after all rounds. Libraries that processes share count in each peak, once in "
        "the shares.",
    }


def _by_part(values: Sequence[dict[str, float]], show: Callable[[float], str]) -> list[list[str]]:
    return [
        [part, *(show(each[part]) if part in each else "" for each in values)]
        for part in PARTS
        if any(each.get(part, 0.0) >= 0.05 for each in values)
    ]
