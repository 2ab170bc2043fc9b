"""`xloom mix`: a mixture of adapters on a running endpoint, and what its gates make of a few prompts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from xloom.commands.adapters import remove_adapter
from xloom.commands.endpoint import Endpoint
from xloom.protocol import XloomError
from xloom.verification.prompts import TEXTS

NEAR = 0.15  # of 1 / K: gates within it, at every prompt, tell no adapter from another
PROBES, PROBE_TOKENS = 4, 8
EXAMPLE = """example: xloom mix routed --routing arrow code docs maths --top-k 1
         xloom mix both --routing fixed --weights code=0.7 docs=0.3
         xloom mix --remove both"""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command, whose names may stand before, between and after its options where it is told so."""

    intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse.ArgumentParser`, which takes names that stand together alone."""
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # the method below comes back to this one
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True


def add_parser(
    commands: Any,
    endpoint_options: Callable[[argparse.ArgumentParser], None],
    endpoint: Callable[[argparse.Namespace], Endpoint],
) -> None:
    """The command's options."""
    text = "Mix adapters of a running endpoint under a name of their own, without training: docs/mixtures.md."
    parser: CommandParser = commands.add_parser(
        "mix", help=text, description=text, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.intermixed = True
    parser.usage = "xloom mix NAME [ADAPTER ...] [options]"
    parser.add_argument("name", metavar="NAME", help="what requests call it")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="*", help="a served adapter's name, or a source")
    text = "where the gates come from: each linear's input, or constants (default: arrow; with --weights, fixed)"
    parser.add_argument("--routing", choices=("arrow", "fixed"), help=text)
    text = "fixed: the adapters' weights (default: alike, and together 1); they name the adapters, too"
    parser.add_argument("--weights", nargs="+", type=_weight, default=[], metavar="ADAPTER=W", help=text)
    parser.add_argument("--top-k", type=int, metavar="K", help="arrow: adapters that a token keeps at each linear")
    parser.add_argument("--temperature", type=float, metavar="T", help="arrow: of the gates' softmax")
    text = "arrow: adapters of general knowledge, whose mean is taken from each of those mixed"
    parser.add_argument("--subtract", nargs="+", default=[], metavar="ADAPTER", help=text)
    parser.add_argument("--replace", action="store_true", help="take the place of one of the same name")
    parser.add_argument("--verify", action="store_true", help="each replica proves it before serving it")
    parser.add_argument("--remove", action="store_true", help="take the mixture out")
    endpoint_options(parser)
    parser.set_defaults(run=lambda arguments, console: _run(parser, endpoint(arguments), arguments, console))


def _weight(text: str) -> tuple[str, float]:
    name, separator, number = text.rpartition("=")
    if not (separator and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not ADAPTER=WEIGHT")
    return name, float(number)


def _run(parser: argparse.ArgumentParser, endpoint: Endpoint, arguments: argparse.Namespace, console: Console) -> int:
    weights, name = dict(arguments.weights), arguments.name
    if arguments.remove:
        if arguments.adapters or weights or arguments.subtract:
            parser.error("--remove takes a name alone")
        return _remove(endpoint, console, name, as_json=arguments.json)
    adapters = list(map(_source, [*arguments.adapters, *(each for each in weights if each not in arguments.adapters)]))
    if len(adapters) < 2:
        parser.error("name two adapters or more")
    body = {
        "name": name,
        "adapters": adapters,
        "routing": arguments.routing or ("fixed" if weights else "arrow"),
        "weights": weights or None,
        "top_k": arguments.top_k,
        "temperature": arguments.temperature,
        "subtract": list(map(_source, arguments.subtract)) or None,
        "replace": arguments.replace or None,
        "verify": arguments.verify or None,
    }
    answer = endpoint.post("/xloom/mixtures", {key: value for key, value in body.items() if value is not None})
    return _show(endpoint, console, answer, as_json=arguments.json)


def _source(adapter: str) -> str:
    """A local folder by its whole path: the endpoint has another working directory. A bare name is an adapter's."""
    path = Path(adapter).expanduser()
    return str(path.resolve()) if ("/" in adapter or adapter.startswith(".")) and path.exists() else adapter


def _remove(endpoint: Endpoint, console: Console, name: str, *, as_json: bool) -> int:
    there = endpoint.get("/xloom/adapters")
    kinds = {each["name"]: each["kind"] for each in there.get("adapters", [])} if isinstance(there, dict) else {}
    if kinds.get(name) == "lora":
        cure = f"`xloom adapters remove {name}` removes it."
        raise XloomError("wrong_kind", f"{name!r} is an adapter, not a mixture.", cure)
    return remove_adapter(endpoint, console, name, as_json=as_json)


def _show(endpoint: Endpoint, console: Console, answer: Any, *, as_json: bool) -> int:
    answer = dict(answer) if isinstance(answer, dict) else {}
    names, routing = list(map(str, answer.get("adapters", []))), str(answer.get("routing", ""))
    found = _gates(endpoint, str(answer.get("name", ""))) if routing == "arrow" else []
    alike = bool(found) and near_uniform(found)
    if as_json:
        console.print_json(data=answer | ({"gates": found, "near_uniform": alike} if found else {}))
        return 0
    said = f"Mixed {', '.join(names)} as {answer.get('name')}: {routing}, of rank {answer.get('rank')}."
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    if found:
        shares = ", ".join(f"{name} {sum(each[name] for each in found) / len(found):.2f}" for name in found[0])
        console.print(f"Mean gates over {len(found)} prompts: {shares}.", highlight=False, markup=False, soft_wrap=True)
    if alike:
        console.print(
            "They are nearly the same at every prompt: this is about the mean of its adapters. Weights, or a router "
            "that is trained, tell them apart better.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    return 0


def _gates(endpoint: Endpoint, model: str) -> list[dict[str, float]]:
    """The mean gates of a few prompts' answers; none where the endpoint does not tell them."""
    found = []
    for text in TEXTS[:PROBES]:
        body = {"model": model, "prompt": text, "max_tokens": PROBE_TOKENS, "temperature": 0}
        try:
            mixture = endpoint.post("/v1/completions", body)["choices"][0].get("mixture")
        except (XloomError, TypeError, KeyError, IndexError, AttributeError):
            return []  # the mixture is there: what it does with prompts is an aside
        if not isinstance(mixture, dict) or not isinstance(mixture.get("gates"), dict):
            return []
        found.append({str(name): float(gate) for name, gate in mixture["gates"].items()})
    return found


def near_uniform(gates: list[dict[str, float]]) -> bool:
    """Whether each prompt's mean gates are nearly 1 / K each."""
    return all(abs(gate * len(each) - 1) <= NEAR for each in gates for gate in each.values())
