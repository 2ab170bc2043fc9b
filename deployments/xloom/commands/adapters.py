"""`xloom adapters`: list, add and remove adapters and bundles of a running endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from xloom.commands.endpoint import Endpoint
from xloom.commands.status import adapter_table


def list_adapters(endpoint: Endpoint, console: Console, *, as_json: bool) -> int:
    """Print what the endpoint's store holds. Raises `XloomError`."""
    answer = endpoint.get("/xloom/adapters")
    adapters: list[dict[str, Any]] = answer.get("adapters", []) if isinstance(answer, dict) else answer
    if as_json:
        console.print_json(data=adapters)
    elif adapters:
        console.print(adapter_table(adapters))
    else:
        console.print("No adapters.")
    return 0


def add_adapter(
    endpoint: Endpoint,
    console: Console,
    name: str,
    source: str,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> int:
    """Add an adapter or bundle; `options` are the route's own fields. Raises `XloomError`."""
    path = Path(source).expanduser()
    source = str(path.resolve()) if path.exists() else source  # the endpoint has another working directory
    answer = endpoint.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": source, **options})
    return _done(console, f"Added {name} from {source}.", answer, as_json)


def remove_adapter(endpoint: Endpoint, console: Console, name: str, *, as_json: bool) -> int:
    """Remove an adapter or bundle. Raises `XloomError`."""
    answer = endpoint.post("/v1/unload_lora_adapter", {"lora_name": name})
    return _done(console, f"Removed {name}.", answer, as_json)


def _done(console: Console, sentence: str, answer: Any, as_json: bool) -> int:
    if as_json:
        console.print_json(data=answer if isinstance(answer, dict) else {"message": str(answer)})
    else:
        console.print(sentence, highlight=False)
    return 0
