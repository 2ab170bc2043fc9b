"""The chart's values.yaml with its comments: each key's line of description, default, and what `@schema` says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

CHART = Path(__file__).parent / "xloom"
SCHEMA_MARK = "@schema "


@dataclass(frozen=True)
class Key:
    """One key of values.yaml."""

    path: tuple[str, ...]  # of an entry in a list: the list's key and "[]"
    default: Any
    description: str
    schema: dict[str, Any]
    children: list[Key] = field(default_factory=list)

    def walk(self) -> Iterator[Key]:
        """This key and all below."""
        yield self
        for child in self.children:
            yield from child.walk()


def read_values(file: Path = CHART / "values.yaml") -> list[Key]:
    """The top-level keys. Raises ValueError for a key without a comment that has no commented children either."""
    text = file.read_text(encoding="utf-8")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{file} is not a mapping")
    return _keys(node, (), text.splitlines())


def _keys(mapping: yaml.MappingNode, path: tuple[str, ...], lines: list[str]) -> list[Key]:
    return [_key(name, value, path, lines) for name, value in mapping.value]


def _key(name: yaml.Node, value: yaml.Node, path: tuple[str, ...], lines: list[str]) -> Key:
    path = (*path, name.value)
    description, schema = _comment(name.start_mark.line, lines)
    children: list[Key] = []
    if _is_block(value) and path != ("settings",):
        children = _keys(value, path, lines)
    elif isinstance(value, yaml.SequenceNode) and value.value and _is_block(value.value[0]):
        children = _keys(value.value[0], (*path, "[]"), lines)
    if not description and not children:
        raise ValueError(f"{'.'.join(path)} has no comment")
    return Key(path, _plain(value), description, schema, children)


def _is_block(node: yaml.Node) -> TypeGuard[yaml.MappingNode]:
    """A mapping whose keys are documented one by one; what stands in a `requests: {...}` style is one value."""
    return (
        isinstance(node, yaml.MappingNode)
        and not node.flow_style
        and bool(node.value)
        and not any(isinstance(value, yaml.MappingNode) and value.flow_style and value.value for _, value in node.value)
    )


def _comment(line: int, lines: list[str]) -> tuple[str, dict[str, Any]]:
    """The comment lines right above a line, or above the first key of a list's entry, beside its dash."""
    found: list[str] = []
    above = line - 1
    while above >= 0:
        text = lines[above].strip()
        if text.startswith("- #"):
            found.append(text[3:].strip())
            break
        if not text.startswith("#"):
            break
        found.append(text[1:].strip())
        above -= 1
    found.reverse()
    schema: dict[str, Any] = {}
    words = []
    for text in found:
        if text.startswith(SCHEMA_MARK):
            schema |= json.loads(text.removeprefix(SCHEMA_MARK))
        else:
            words.append(text)
    return " ".join(words), schema


def _plain(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_document(node)
