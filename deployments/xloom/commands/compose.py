"""`xloom compose`: a router for the adapters you have, trained on text of each, and judged on text held out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloom.compose.options import ROUTINGS, Options
from xloom.protocol import XloomError
from xloom.settings import ModelSettings, Settings, load_settings
from xloom.stages import Stages

if TYPE_CHECKING:
    from xloom.compose.composition import Composed, Listener
    from xloom.compose.plan import Plan

_DEFAULTS = Options()


def add_parser(commands: Any) -> None:
    """The command's options."""
    text = "Train a router over adapters and a base model that stay as they are, and judge it on held-out text."
    parser: argparse.ArgumentParser = commands.add_parser(
        "compose",
        help=text,
        description=text,
        epilog="example: xloom compose ./base --adapters code=./code docs=./docs --text code=a.jsonl docs=b.jsonl "
        "--out ./blend; an interrupted run goes on when the same command is given again",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, hub id, or YAML settings file (default: the sample's)"
    )
    parser.add_argument(
        "--adapters", nargs="+", default=[], metavar="NAME=SOURCE", help="to mix; NAME alone: one of the settings file"
    )
    what = "text of each adapter's domain: a .txt, .json or .jsonl file, a hub dataset, or sample"
    parser.add_argument("--text", nargs="+", default=[], metavar="NAME=TEXT", help=what)
    parser.add_argument("--mixed", metavar="TEXT", help="text of many domains, as it will be asked for")
    parser.add_argument("--routing", choices=ROUTINGS, help="(default: linear, which serves in one row)")
    what = "X-LoRA bundle whose gates a linear router learns; its adapters take the place of --adapters"
    parser.add_argument("--distil", metavar="BUNDLE", help=what)
    what = "after --distil, so many steps of language-model loss (default: 0)"
    parser.add_argument("--tune", type=int, metavar="STEPS", help=what)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the result, to be served")
    _training_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    parser.set_defaults(run=run)


def _training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")

    def option(name: str, kind: type, metavar: str, what: str) -> None:
        what = f"{what} (default: {getattr(_DEFAULTS, name):g})"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=what)

    option("steps", int, "N", "of the training from adapters and text")
    option("fitted_rows", int, "N", "distil: on which the bundle's gates are fitted by least squares")
    option("batch", int, "ROWS", "of a step")
    option("length", int, "TOKENS", "of a row")
    option("learning_rate", float, "RATE", "at its peak")
    option("domain_share", float, "SHARE", "of the cross-entropy between gates and domain, which keeps gates readable")
    option("seed", int, "N", "of the rows and first weights")
    option("temperature", float, "T", "of the gates' softmax")
    option("depth", int, "N", "xlora: linears of the classifier")
    option("size", int, "N", "xlora: of its inner layers")
    what = "xlora: the same gates at every linear (default: gates of its own for each)"
    group.add_argument("--no-layerwise", dest="layerwise", action="store_const", const=False, help=what)
    option("held_out_rows", int, "N", "of each domain and of mixed text in the table")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best that is here)")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Train as the command line says. Raises `XloomError`."""
    from xloom.commands.local import read_tokenizer
    from xloom.compose.composition import compose
    from xloom.compose.plan import Plan

    settings = _settings(arguments.model)
    named = pairs("--adapters", arguments.adapters, {entry.name: entry.source for entry in settings.adapters})
    if named and arguments.distil:
        cure = "Leave --adapters out: they are the bundle's."
        raise XloomError("invalid_composition", "--adapters and --distil say both what is mixed.", cure)
    if arguments.distil and arguments.steps is not None:
        cure = "Give --tune STEPS."
        raise XloomError("invalid_composition", "--steps says how long a router trains without --distil.", cure)
    with TemporaryDirectory(prefix="xloom-") as scratch, Stages(Console(stderr=True)) as stages:
        fetched = Path(scratch)
        plan = Plan(
            base=settings.model,
            adapters={name: Path(source) for name, source in named.items()},
            text=pairs("--text", arguments.text),
            mixed=arguments.mixed,
            out=arguments.out,
            bundle=Path(arguments.distil) if arguments.distil else None,
            device=arguments.device,
            options=chosen(arguments),
        )
        plan.check()
        stages.begin("Fetching adapters")
        plan = _fetch(plan, named, arguments.distil, fetched)
        with _speaking_of(plan, named, arguments.distil):
            composed = compose(plan, read_tokenizer(settings), _listener(stages))
    if arguments.json:
        console.print_json(data=composed.record)
    else:
        show(composed, console)
    return 0


def _settings(named: str | None) -> Settings:
    if named is None or named.endswith((".yaml", ".yml")):
        return load_settings(None if named is None else Path(named))
    return Settings(model=ModelSettings(source=named))


def chosen(arguments: argparse.Namespace) -> Options:
    """The plan's options, those given on the command line in place of the defaults."""
    names = (
        "routing", "depth", "size", "layerwise", "temperature", "steps", "fitted_rows", "tune", "batch",
        "length", "learning_rate", "domain_share", "seed", "held_out_rows",
    )  # fmt: skip
    return Options(**{name: value for name in names if (value := getattr(arguments, name)) is not None})


def pairs(option: str, given: Sequence[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """NAME=VALUE of an option; a NAME alone stands for what is known under it. Raises `XloomError`."""
    found: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals and known and name in known:
            value = known[name]
        if not name or not value:
            cure = f"Write {option} NAME=VALUE" + (f", or one of {', '.join(known)}." if known else ".")
            raise XloomError("invalid_composition", f"{option} {each!r} is not NAME=VALUE.", cure)
        if name in found:
            raise XloomError("invalid_composition", f"{option} names {name!r} twice.", "Name each once.")
        found[name] = value
    return found


def _fetch(plan: Plan, named: Mapping[str, str], bundle: str | None, into: Path) -> Plan:
    """The plan with its adapters, or its bundle, in local folders that hold nothing else and no pickle."""
    from xloom.adapters.companions import fetch_companions
    from xloom.adapters.source_rules import SourceRules
    from xloom.adapters.sources import adapter_folder, fetch

    rules = SourceRules()

    def one(source: str, place: Path) -> tuple[str, Path]:
        source = str(Path(source).resolve()) if Path(source).expanduser().is_dir() and source[0] != "~" else source
        fetch(source, place, rules)
        return source, adapter_folder(place, source)

    if bundle is None:
        folders = {name: one(source, into / name)[1] for name, source in named.items()}
        return dataclasses.replace(plan, adapters=folders)
    source, folder = one(bundle, into / "source" / "fetched")
    fetch_companions(source, folder, rules)
    return dataclasses.replace(plan, bundle=folder, root=into / "source")


@contextmanager
def _speaking_of(plan: Plan, named: Mapping[str, str], bundle: str | None) -> Iterator[None]:
    """Errors name what was given, not the copies of it."""
    given = {str(folder): named[name] for name, folder in plan.adapters.items()}
    if plan.bundle is not None and bundle is not None:
        given[str(plan.bundle)] = bundle
    try:
        yield
    except XloomError as error:
        message = error.message
        for copy, source in given.items():
            message = message.replace(copy, source)
        raise XloomError(error.code, message, error.cure, error.status) from None


def _listener(stages: Stages) -> Listener:
    from xloom.compose.composition import Listener
    from xloom.compose.training import Told

    class Showing(Listener):
        def stage(self, name: str) -> None:
            stages.begin(name)

        def step(self, told: Told) -> None:
            stages.still(str(told))

    return Showing()


def show(composed: Composed, console: Console) -> None:
    """The tables: perplexity and mean gates on held-out text."""
    perplexity, record = composed.figures.perplexity, composed.record
    columns = list(perplexity["base"])
    table = _table("held-out perplexity on", columns)
    best = {column: min(values[column] for values in perplexity.values()) for column in columns}
    for name, values in perplexity.items():
        cells = [f"[bold]{values[c]:.2f}[/bold]" if values[c] == best[c] else f"{values[c]:.2f}" for c in columns]
        table.add_row(escape(_called(name, composed)), *cells)
    console.print(table)
    names = record["adapters"]
    gates = _table("mean gates on", names)
    for way, by_column in composed.figures.gates.items():
        for column, values in by_column.items():
            gates.add_row(escape(f"{_called(way, composed)}, {column}"), *(f"{values[name]:.2f}" for name in names))
    console.print(gates)
    if composed.agreement is not None:
        alike = composed.agreement
        console.print(
            f"As the bundle: the likeliest token for {alike.tokens:.1%} of tokens, the strongest adapter for "
            f"{alike.adapters:.1%} of tokens and linears; a gate differs by {alike.gates:.3f} on average."
        )
    console.print(f"Trained in {composed.seconds:.0f} s. Written to {escape(record['out'])}", soft_wrap=True)


def _table(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column(first)
    for column in columns:
        table.add_column(escape(column), justify="right")
    return table


def _called(name: str, composed: Composed) -> str:
    if name == "arrow":
        return f"Arrow, top {composed.arrow.top_k}, T {composed.arrow.temperature:g}"
    return {"bundle": "the bundle", "router": "the new router", "uniform": "uniform weights"}.get(name, name)
