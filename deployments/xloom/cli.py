"""The `xloom` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from xloom.commands.adapters import add_adapter, list_adapters, remove_adapter
from xloom.commands.doctor import diagnose
from xloom.commands.endpoint import DEFAULT_URL, Endpoint
from xloom.commands.serve import serve
from xloom.commands.status import show_status
from xloom.protocol import XloomError
from xloom.settings import client_key

FAILED = 2  # also argparse's own exit code for a wrong command line
INTERRUPTED = 130
PIPE_WIDTH = 200  # columns of a table that goes to a file


def port_number(text: str) -> int:
    """A TCP port; 0 means any free one."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError(text)
    return port


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="xloom",
        description="Serve one model with many LoRA adapters and their X-LoRA mixture.",
        epilog="example: xloom serve",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_status(commands)
    _add_adapters(commands)
    _add_doctor(commands)
    return parser


def _command(commands: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: {example}"
    )
    return parser


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")


def _endpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the endpoint (default: {DEFAULT_URL})")
    parser.add_argument("--admin-key", help="its key, where it has one (default: XLOOM_ADMIN_KEY, else XLOOM_API_KEY)")
    _json_option(parser)


def _add_serve(commands: Any) -> None:
    parser = _command(commands, "serve", "Serve a deployment until Ctrl-C.", "xloom serve settings.yaml --port 8080")
    parser.add_argument("settings", nargs="?", type=Path, metavar="SETTINGS", help="YAML file (default: the sample)")
    parser.add_argument("--port", type=port_number, help="instead of router.port; 0 for any free one")
    parser.set_defaults(run=lambda arguments, console: serve(arguments.settings, arguments.port), json=False)


def _add_status(commands: Any) -> None:
    text = "Show replicas, queues, KV pages and adapters."
    parser = _command(commands, "status", text, "xloom status --url http://127.0.0.1:8000")
    _endpoint_options(parser)
    parser.set_defaults(
        run=lambda arguments, console: show_status(_endpoint(arguments), console, as_json=arguments.json)
    )


def _add_adapters(commands: Any) -> None:
    parser = _command(commands, "adapters", "List, add and remove adapters and bundles.", "xloom adapters list")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = _command(actions, "list", "List adapters and bundles.", "xloom adapters list --json")
    _endpoint_options(listing)
    listing.set_defaults(
        run=lambda arguments, console: list_adapters(_endpoint(arguments), console, as_json=arguments.json)
    )

    adding = _command(
        actions,
        "add",
        "Add an adapter or X-LoRA bundle; requests then name it as their model.",
        "xloom adapters add code ./adapters/code; xloom adapters add blend ./blend --kind xlora --top-k 2",
    )
    adding.add_argument("name", metavar="NAME", help="what requests call it")
    adding.add_argument("source", metavar="SOURCE", help="folder, Hugging Face hub id, or URL (s3://, gs://)")
    adding.add_argument("--kind", choices=("lora", "xlora"), help="(default: what the source says)")
    adding.add_argument("--top-k", type=int, help="X-LoRA: keep the K largest gates of each token")
    adding.add_argument("--temperature", type=float, help="X-LoRA: of the gates' softmax")
    adding.add_argument("--mixing-mode", choices=("additive", "concatenate", "gated"), help="X-LoRA: how to mix")
    adding.add_argument("--replace", action="store_true", help="take the place of one of the same name")
    _endpoint_options(adding)
    adding.set_defaults(run=_run_add)

    removing = _command(actions, "remove", "Remove an adapter or bundle.", "xloom adapters remove code")
    removing.add_argument("name", metavar="NAME")
    _endpoint_options(removing)
    removing.set_defaults(
        run=lambda arguments, console: remove_adapter(
            _endpoint(arguments), console, arguments.name, as_json=arguments.json
        )
    )


def _add_doctor(commands: Any) -> None:
    text = "Say what is here, what is missing, and the command that mends it. Exits with 1 when serving can't work."
    parser = _command(commands, "doctor", text, "xloom doctor settings.yaml")
    parser.add_argument("settings", nargs="?", type=Path, metavar="SETTINGS", help="YAML file (default: the sample)")
    _json_option(parser)
    parser.set_defaults(run=lambda arguments, console: diagnose(arguments.settings, console, as_json=arguments.json))


def _endpoint(arguments: argparse.Namespace) -> Endpoint:
    return Endpoint(arguments.url, arguments.admin_key or client_key())


def _run_add(arguments: argparse.Namespace, console: Console) -> int:
    options = {
        "kind": arguments.kind,
        "top_k": arguments.top_k,
        "temperature": arguments.temperature,
        "mixing_mode": arguments.mixing_mode,
        "load_inplace": arguments.replace or None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return add_adapter(_endpoint(arguments), console, arguments.name, arguments.source, given, as_json=arguments.json)


def _show_error(error: XloomError, *, as_json: bool) -> None:
    if as_json:
        body = {"code": error.code, "message": error.message, "cure": error.cure}
        print(json.dumps({"error": body}))
        return
    console = Console(stderr=True, highlight=False)
    console.print(f"[red]{escape(error.message)}[/red] [dim]{escape(f'[{error.code}]')}[/dim]", soft_wrap=True)
    if error.cure:
        console.print(escape(error.cure), soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 when it worked, 2 on an error, 130 when interrupted; `doctor` adds 1."""
    arguments = build_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    try:
        code: int = arguments.run(arguments, console)
    except XloomError as error:
        _show_error(error, as_json=arguments.json)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
