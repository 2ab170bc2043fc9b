"""Writes helm/xloom/values.schema.json from values.yaml and xloom's settings; `--check`: whether it is up to date."""

from __future__ import annotations

import json
import sys
from typing import Any

from commented import CHART, Key, read_values

from xloom.settings import Settings

SCHEMA = CHART / "values.schema.json"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def of_key(key: Key) -> dict[str, Any]:
    """A key's schema: its default's type, its children, and what its comment adds."""
    if key.path == ("settings",):
        return {"description": "xloom's settings: docs/settings.md", "$ref": "#/$defs/Settings"}
    schema: dict[str, Any] = {}
    if key.description:
        schema["description"] = key.description
    if key.default is not None:
        schema["type"] = _TYPES[type(key.default)]
    properties = {child.path[-1]: of_key(child) for child in key.children}
    if properties and isinstance(key.default, list):
        required = [child.path[-1] for child in key.children if child.schema.get("required")]
        schema["items"] = {"type": "object", "additionalProperties": False, "properties": properties}
        if required:
            schema["items"]["required"] = required
    elif properties:
        schema |= {"additionalProperties": False, "properties": properties}
    return schema | {name: value for name, value in key.schema.items() if name != "required"}


def _bare(node: Any) -> Any:
    """Without titles and defaults: the settings' own defaults hold, and some are paths of an installation."""
    if isinstance(node, dict):
        # Under "properties" the names are keys of the settings, whatever they are called.
        return {
            name: {each: _bare(value) for each, value in inner.items()} if name == "properties" else _bare(inner)
            for name, inner in node.items()
            if name not in ("title", "default")
        }
    return [_bare(each) for each in node] if isinstance(node, list) else node


def schema() -> dict[str, Any]:
    """The whole schema."""
    settings = _bare(Settings.model_json_schema())
    definitions = settings.pop("$defs")
    properties = {key.path[-1]: of_key(key) for key in read_values()}
    properties["global"] = {"description": "Helm's own", "type": "object"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": {**definitions, "Settings": settings},
    }


def main(arguments: list[str]) -> int:
    """The command."""
    text = json.dumps(schema(), indent=2) + "\n"
    if "--check" in arguments:
        if SCHEMA.is_file() and SCHEMA.read_text(encoding="utf-8") == text:
            return 0
        print(
            f"{SCHEMA.name} is not what values.yaml and the settings say. Run: python helm/schema.py", file=sys.stderr
        )
        return 1
    SCHEMA.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
