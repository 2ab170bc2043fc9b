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

from xloom.commands import check, compose, dashboards, mix, quantize, tune
from xloom.commands.adapters import add_adapter, list_adapters, remove_adapter
from xloom.commands.build import write_config
from xloom.commands.doctor import diagnose, diagnose_cluster, show_isq
from xloom.commands.endpoint import DEFAULT_URL, Endpoint
from xloom.commands.memory_plan import memory_size, show_plan
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


def positive(text: str) -> int:
    """A number of things, at least one."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = mix.CommandParser(
        prog="xloom",
        description="Serve one model with many LoRA adapters and their mixtures.",
        epilog="example: xloom serve",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_status(commands)
    _add_adapters(commands)
    mix.add_parser(commands, _endpoint_options, _endpoint)
    _add_chat(commands)
    _add_generate(commands)
    compose.add_parser(commands)
    quantize.add_parser(commands)
    tune.add_parser(commands)
    dashboards.add_parser(commands)
    _add_build(commands)
    _add_doctor(commands)
    check.add_parser(commands, positive)
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
    text = "its key, where it has one (default: XLOOM_ADMIN_KEY, else XLOOM_API_KEY)"
    parser.add_argument("--admin-key", "--api-key", dest="admin_key", help=text)
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
    adding.add_argument(
        "--routing-passes", type=int, choices=(1, 2), help="X-LoRA: 1 is another model at half the price"
    )
    adding.add_argument("--prefill", choices=("exact", "lagged"), help="X-LoRA in one pass: how the prompt is routed")
    adding.add_argument("--verify", action="store_true", help="each replica proves it before serving it")
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


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="base, adapter or bundle (default: the first bundle, else base)"
    )
    parser.add_argument("--url", help="an endpoint to ask (default: the model is loaded in this process)")
    parser.add_argument("--api-key", "--admin-key", dest="api_key", help="the endpoint's (default: XLOOM_API_KEY)")
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest (default: the model's own)")
    _json_option(parser)


def _add_chat(commands: Any) -> None:
    text = "Talk with a model, in this process or, with --url, at an endpoint. One message may come from stdin."
    parser = _command(commands, "chat", text, 'xloom chat --model code --message "Write a loop."')
    parser.add_argument("settings", nargs="?", type=Path, metavar="SETTINGS", help="YAML file (default: the sample)")
    parser.add_argument("--message", metavar="TEXT", help="answer this alone (default: talk)")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    _model_options(parser)
    parser.set_defaults(run=_run_chat)


def _add_generate(commands: Any) -> None:
    text = "Continue a text, by a model in this process or, with --url, at an endpoint."
    parser = _command(commands, "generate", text, 'xloom generate "def main():" --model code --max-tokens 64')
    parser.usage = "%(prog)s [SETTINGS] (PROMPT | --prompt TEXT) [options]"
    parser.add_argument(
        "words", nargs="*", metavar="[SETTINGS] PROMPT", help="YAML file (default: the sample); text, or - for stdin"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the text, where it would pass for a file")
    _model_options(parser)
    parser.set_defaults(run=_run_generate)


def _add_build(commands: Any) -> None:
    text = "Write the file that `serve deploy` and a KubeRay RayService take, from a settings file."
    parser = _command(commands, "build", text, "xloom build settings.yaml -o serve.yaml && serve deploy serve.yaml")
    parser.add_argument("settings", nargs="?", type=Path, metavar="SETTINGS", help="YAML file (default: the sample)")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="(default: standard output)")
    parser.set_defaults(run=lambda arguments, console: write_config(arguments.settings, arguments.out), json=False)


def _add_doctor(commands: Any) -> None:
    text = "Say what is here, what is missing, and the command that mends it. Exits with 1 when serving can't work."
    parser = _command(commands, "doctor", text, "xloom doctor settings.yaml")
    parser.add_argument("settings", nargs="?", type=Path, metavar="SETTINGS", help="YAML file (default: the sample)")
    instead = parser.add_mutually_exclusive_group()
    text = "say instead whether a GPU that shows so much memory serves them, as 24GiB: docs/sizing.md"
    instead.add_argument("--gpu-memory", type=memory_size, metavar="SIZE", help=text)
    text = "look instead at the cluster that kubectl reaches; SETTINGS is then a values file of the chart"
    instead.add_argument("--kubernetes", action="store_true", help=text)
    parser.add_argument("-n", "--namespace", default="default", help="with --kubernetes (%(default)s)")
    instead.add_argument("--isq", action="store_true", help="say instead what each way of quantising is on each device")
    _json_option(parser)
    parser.set_defaults(run=_run_doctor)


def _endpoint(arguments: argparse.Namespace) -> Endpoint:
    return Endpoint(arguments.url, arguments.admin_key or client_key())


def _run_doctor(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.isq:
        return show_isq(console, as_json=arguments.json)
    if arguments.gpu_memory is not None:
        return show_plan(arguments.settings, arguments.gpu_memory, console, as_json=arguments.json)
    if arguments.kubernetes:
        return diagnose_cluster(arguments.settings, arguments.namespace, console, as_json=arguments.json)
    return diagnose(arguments.settings, console, as_json=arguments.json)


def _run_chat(arguments: argparse.Namespace, console: Console) -> int:
    from xloom.commands.chat import chat
    from xloom.commands.opening import opened
    from xloom.commands.text_model import Options

    options = Options(arguments.max_tokens, arguments.temperature)
    with opened(arguments.settings, arguments.url, arguments.api_key or client_key(), arguments.model) as source:
        return chat(source, arguments.message, arguments.model, arguments.system, options, as_json=arguments.json)


def _run_generate(arguments: argparse.Namespace, console: Console) -> int:
    from xloom.commands.generate import generate, words_of
    from xloom.commands.opening import opened
    from xloom.commands.text_model import Options

    settings, prompt = words_of(arguments.words, arguments.prompt)
    options = Options(arguments.max_tokens, arguments.temperature)
    with opened(settings, arguments.url, arguments.api_key or client_key(), arguments.model) as source:
        return generate(source, prompt, arguments.model, options, as_json=arguments.json)


def _run_add(arguments: argparse.Namespace, console: Console) -> int:
    options = {
        "kind": arguments.kind,
        "top_k": arguments.top_k,
        "temperature": arguments.temperature,
        "mixing_mode": arguments.mixing_mode,
        "routing_passes": arguments.routing_passes,
        "prefill": arguments.prefill,
        "load_inplace": arguments.replace or None,
        "verify": arguments.verify or None,
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


def _path_error(error: OSError) -> XloomError:
    """A file or folder that was named and can't be used: no permission, a folder for a file, a full disk."""
    cure = "See to its permissions and its kind, or name another."
    return XloomError("path_unusable", f"{error.filename} can't be used: {error.strerror}.", cure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 when it worked, 2 on an error, 130 when interrupted; `doctor` and `check` add 1."""
    arguments = build_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    try:
        code: int = arguments.run(arguments, console)
    except XloomError as error:
        _show_error(error, as_json=arguments.json)
        return FAILED
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("xloom"):
            raise
        _show_error(
            XloomError(
                "missing_package",
                f"This needs the package {error.name!r}, which is not installed.",
                "`xloom doctor` says what is missing, and the command that installs it.",
            ),
            as_json=arguments.json,
        )
        return FAILED
    except OSError as error:
        if error.filename is None:
            raise
        _show_error(_path_error(error), as_json=arguments.json)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
