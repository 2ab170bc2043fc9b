"""`xloom status`: replicas, queues, KV pages and adapters of a running endpoint."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloom.commands.endpoint import Endpoint
from xloom.protocol import adapter_key, split_adapter_key

GENERATION_CHARS = 8
STATE_COLOURS = {"ready": "green", "draining": "yellow", "lost": "red"}


def size_text(size: int) -> str:
    """Bytes, as people read them."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def adapter_table(adapters: list[dict[str, Any]], *, replicas: int | None = None) -> Table:
    """Adapters and bundles; with `replicas`, on how many of them each is."""
    table = Table(title="Adapters")
    for column in ("name", "kind", "generation"):
        table.add_column(column, no_wrap=True)
    for column in ("rank", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    if replicas is not None:
        table.add_column("replicas", justify="right")
    for adapter in adapters:
        row = [
            str(adapter.get("name", "")),
            str(adapter.get("kind", "")),
            str(adapter.get("generation") or "")[:GENERATION_CHARS],
            str(adapter.get("rank") or ""),
            size_text(int(adapter.get("size") or 0)),
            str(adapter.get("source") or ""),
        ]
        if replicas is not None:
            row.append(f"{adapter.get('replicas', 0)}/{replicas}")
        table.add_row(*map(escape, row))
    return table


def replica_table(replicas: list[dict[str, Any]]) -> Table:
    """Replicas, with what each is doing."""
    table = Table(title="Replicas")
    for column in ("id", "node", "state"):
        table.add_column(column, overflow="fold")
    for column in ("running", "waiting", "KV pages", "occupancy", "preempted"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("resident adapters", overflow="fold")
    for replica in replicas:
        stats = replica.get("stats") or {}
        used, total = int(stats.get("kv_pages_used", 0)), int(stats.get("kv_pages_total", 0))
        state = str(replica.get("state", "?"))
        colour = STATE_COLOURS.get(state, "default")
        table.add_row(
            escape(str(replica.get("id", ""))),
            escape(str(replica.get("node") or "")),
            f"[{colour}]{escape(state)}[/{colour}]",
            str(stats.get("running", 0)),
            str(stats.get("waiting", 0)),
            f"{used}/{total}",
            f"{used / total:.0%}" if total else "",
            str(stats.get("preemptions", 0)),
            escape(", ".join(short_name(name) for name in stats.get("adapters", []))),
        )
    return table


def short_name(resident: str) -> str:
    """An `adapter_key` with the generation cut short."""
    name, generation = split_adapter_key(resident)
    return adapter_key(name, generation[:GENERATION_CHARS]) if generation else name


def show_status(endpoint: Endpoint, console: Console, *, as_json: bool) -> int:
    """Print the endpoint's status. Raises `XloomError`."""
    status = endpoint.get("/xloom/status")
    if as_json:
        console.print_json(data=status)
        return 0
    replicas = status.get("replicas", [])
    in_flight = status.get("router", {}).get("in_flight", 0)
    console.print(
        f"[bold]{escape(str(status.get('model', '')))}[/bold] at {endpoint.url}, {in_flight} requests in flight"
    )
    console.print(replica_table(replicas) if replicas else "No replicas.")
    failure = status.get("start_failure")
    if failure and not replicas:
        console.print(f"[red]The last one did not start:[/red] {escape(str(failure))}", soft_wrap=True)
    adapters = status.get("adapters", [])
    console.print(adapter_table(adapters, replicas=len(replicas)) if adapters else "No adapters.")
    return 0
