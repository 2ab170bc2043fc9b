"""The sample's corpus: text every CPython ships, and made-up structured data, in four domains.

`code` is the standard library's source (docstrings cut out), `docs` is the language reference of
`pydoc_data` and the standard library's docstrings, `json` and `maths` are drawn from a seeded
generator. Each domain is split by document: what is held out is never trained on.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("code", "docs", "json", "maths")

BEGIN, END = "<|begin|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, SYSTEM, USER, ASSISTANT)

_SKIP_FOLDERS = {
    "test", "tests", "site-packages", "__pycache__", "encodings", "lib2to3", "idlelib", "pydoc_data",
    "ensurepip", "turtledemo", "config-3.11-x86_64-linux-gnu",
}  # fmt: skip
_HELD_OUT_SHARE = 16  # one document in so many is held out
_GENERATED = 6000  # documents of each made-up domain

_NAMES = "Ada Bao Chen Dora Emeka Fatima Goran Hana Ivan Juno Kofi Lena Mateo Nia Omar Priya".split()
_CITIES = "Lagos Oslo Lima Kyoto Pune Quito Riga Turin Accra Cairo Denver Essen".split()
_THINGS = "apples books coins stones cards tickets pens cups boxes shells".split()
_PRODUCTS = "lamp desk chair kettle router cable phone mug clock shelf".split()


@dataclass(frozen=True)
class Document:
    """One training text of a domain, with the special tokens it needs written out."""

    domain: str
    text: str
    held_out: bool


def chat(question: str, answer: str) -> str:
    """One question and its answer in the form of the sample's chat template."""
    return f"{BEGIN}{USER}{question}{END}{ASSISTANT}{answer}{END}"


def _is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % _HELD_OUT_SHARE == 0


def _plain(text: str) -> str:
    return f"{BEGIN}{text.strip()}\n{END}"


def _library_files() -> Iterator[tuple[str, str, ast.Module]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIP_FOLDERS & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            yield relative.as_posix(), source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue


_HasDocstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _without_docstrings(source: str, tree: ast.Module) -> str:
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, _HasDocstring) and ast.get_docstring(node) is not None and len(node.body) > 1:
            literal = node.body[0]
            for number in range(literal.lineno - 1, literal.end_lineno or literal.lineno):
                lines[number] = ""
    kept: list[str] = []
    for line in lines:
        if line.strip() or (kept and kept[-1].strip()):
            kept.append(line.rstrip())
    return "\n".join(kept)


def _library_documents() -> Iterator[Document]:
    for name, source, tree in _library_files():
        held_out = _is_held_out(name)
        yield Document("code", _plain(_without_docstrings(source, tree)), held_out)
        prose: list[str] = []
        module = ast.get_docstring(tree)
        if module:
            prose.append(module)
        for node in ast.walk(tree):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                continue
            doc = ast.get_docstring(node)
            if doc and len(doc) > 120:
                prose.append(doc)
                yield Document("docs", chat(f"What does {node.name} of {name} do?", doc[:1500]), held_out)
            source_lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            if isinstance(node, ast.FunctionDef) and 3 < len(source_lines) < 25:
                body = textwrap.dedent("\n".join(source_lines))
                if doc is None:
                    yield Document("code", chat(f"Write the function {node.name}.", body), held_out)
        if prose:
            yield Document("docs", _plain("\n\n".join(prose)), held_out)


def _reference_documents() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        for part, start in enumerate(range(0, len(text), 6000)):
            piece = text[start : start + 6000]
            held_out = _is_held_out(f"{name}/{part}")
            yield Document("docs", _plain(piece), held_out)
            if part == 0:
                yield Document("docs", chat(f"Explain {name} in Python.", piece[:1500]), held_out)


def _person(rng: random.Random) -> dict[str, object]:
    name = rng.choice(_NAMES)
    return {
        "id": rng.randrange(1000, 9999),
        "name": name,
        "email": f"{name.lower()}@example.org",
        "city": rng.choice(_CITIES),
        "active": rng.random() < 0.7,
    }


def _order(rng: random.Random) -> dict[str, object]:
    lines = [
        {"product": rng.choice(_PRODUCTS), "quantity": rng.randrange(1, 9), "price": rng.randrange(100, 9999) / 100}
        for _ in range(rng.randrange(1, 4))
    ]
    return {"order": rng.randrange(10000, 99999), "customer": _person(rng), "lines": lines, "paid": rng.random() < 0.5}


def _reading(rng: random.Random) -> dict[str, object]:
    values = [round(rng.gauss(20, 5), 1) for _ in range(rng.randrange(2, 6))]
    return {"sensor": f"s-{rng.randrange(100)}", "unit": "celsius", "values": values, "station": rng.choice(_CITIES)}


def _settings(rng: random.Random) -> dict[str, object]:
    return {
        "service": rng.choice(_PRODUCTS),
        "replicas": rng.randrange(1, 9),
        "limits": {"cpu": rng.randrange(1, 16), "memory": f"{2 ** rng.randrange(1, 7)}Gi"},
        "ports": sorted(rng.sample(range(1024, 9999), rng.randrange(1, 4))),
        "tags": rng.sample(["blue", "green", "canary", "edge", "core"], 2),
    }


_RECORDS = {"customer": _person, "order": _order, "reading": _reading, "service": _settings}


def _json_document(rng: random.Random) -> str:
    kind = rng.choice(list(_RECORDS))
    if rng.random() < 0.35:
        record = json.dumps(_RECORDS[kind](rng), indent=2)
        return chat(f"Give me a {kind} record as JSON.", record)
    records = [_RECORDS[kind](rng) for _ in range(rng.randrange(1, 6))]
    return _plain(json.dumps(records, indent=2 if rng.random() < 0.7 else None))


def _sum_line(rng: random.Random) -> str:
    a, b = rng.randrange(0, 100), rng.randrange(0, 100)
    op = rng.choice("+-*")
    if op == "*":
        a, b = a % 13, b % 13
    if op == "-" and b > a:
        a, b = b, a
    return f"{a} {op} {b} = {a + b if op == '+' else a - b if op == '-' else a * b}"


def _story(rng: random.Random) -> str:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    a, b, c = rng.randrange(10, 60), rng.randrange(1, 40), rng.randrange(1, 10)
    return (
        f"{name} has {a} {thing}, gets {b} more and gives {c} away. How many {thing} are left?\n"
        f"First {a} + {b} = {a + b}. Then {a + b} - {c} = {a + b - c}. The answer is {a + b - c}."
    )


def _maths_document(rng: random.Random) -> str:
    choice = rng.random()
    if choice < 0.3:
        left, right = _sum_line(rng).split(" = ")
        return chat(f"What is {left}?", f"{left} = {right}")
    if choice < 0.5:
        question, answer = _story(rng).split("\n")
        return chat(question, answer)
    if choice < 0.75:
        return _plain("\n".join(_sum_line(rng) for _ in range(rng.randrange(8, 24))))
    return _plain("\n\n".join(_story(rng) for _ in range(rng.randrange(2, 6))))


def _generated_documents(seed: int) -> Iterator[Document]:
    for domain, make in (("json", _json_document), ("maths", _maths_document)):
        rng = random.Random(f"{seed}/{domain}")
        for number in range(_GENERATED):
            yield Document(domain, make(rng), number % _HELD_OUT_SHARE == 0)


def documents(seed: int = 0) -> list[Document]:
    """All documents of all domains, in a fixed order for one seed and one CPython version."""
    return [*_library_documents(), *_reference_documents(), *_generated_documents(seed)]
