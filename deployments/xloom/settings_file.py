"""A settings file as plain data: YAML read strictly, and `${VARIABLE}` put in from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from xloom.protocol import XloomError

TEXT_FILES = (".txt", ".json", ".jsonl")  # that a calibration text may be in
_PATHS = {  # section -> its keys that may name a local file or folder
    "model": ("source",),
    "adapters": ("source",),
    "xlora": ("source",),
    "isq": ("calibration", "cache"),
    "store": ("path", "cache"),
}
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "merge"))


class _Loader(yaml.SafeLoader):
    """YAML whose keys are there once, and whose numbers are what people take them for.

    PyYAML keeps the last of two equal keys, and reads 12:30 as 750 (base 60) and 010 as 8, as YAML 1.1 has it. What
    other libraries change in PyYAML's own loaders (lm-format-enforcer makes dates texts) does not reach this one.
    """

    yaml_constructors = {
        f"tag:yaml.org,2002:{name}": getattr(SafeConstructor, f"construct_yaml_{name}")
        for name in "null bool int float binary timestamp omap pairs set str seq map".split()
    } | {None: SafeConstructor.construct_undefined}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice, on lines {lines[key.value]} and {line}",
                    problem_mark=key.start_mark,
                )
            lines[key.value] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in Resolver.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z|0x[0-9a-fA-F_]+\Z"), list("-+0123456789"))


def read_settings_file(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as it stands there.

    Raises `XloomError`: settings_not_found, settings_unreadable, and invalid_settings for what is not YAML, has a key
    twice or is no mapping.
    """
    try:
        data = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise XloomError("settings_not_found", f"There is no settings file {file}.", "Name an existing file.") from None
    except OSError as error:
        cure = "Name the YAML file in it." if isinstance(error, IsADirectoryError) else "See to its permissions."
        raise XloomError(
            "settings_unreadable", f"The settings file {file} can't be read: {error.strerror or error}.", cure
        ) from None
    except UnicodeDecodeError as error:
        raise XloomError(
            "settings_unreadable",
            f"The settings file {file} is not UTF-8 text (byte {error.start}: {error.reason}).",
            f"Save it as UTF-8: iconv -f LATIN1 -t UTF-8 {file}, or UTF-16 in place of LATIN1.",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that is none
        told = str(error) or type(error).__name__
        raise XloomError("invalid_settings", f"{file} is not proper YAML: {told}", "Mend the file.") from None
    if not isinstance(data, dict):
        raise XloomError("invalid_settings", f"{file} must hold a mapping of settings.", "See docs/settings.md.")
    return data


def with_variables(data: Any, environment: Mapping[str, str], path: str = "") -> Any:
    """The data with `${NAME}` in its texts replaced by the variable's value; `$${` stands for a plain `${`.

    What is put in is text, wherever it stands: it never becomes a key, a list or a section. Raises `XloomError`
    (invalid_settings) for a variable that is not set or that has no proper name.
    """
    if isinstance(data, Mapping):
        return {key: with_variables(value, environment, f"{path}.{key}".lstrip(".")) for key, value in data.items()}
    if isinstance(data, list):
        return [with_variables(value, environment, f"{path}.{number}") for number, value in enumerate(data)]
    if not isinstance(data, str):
        return data

    def value_of(found: re.Match[str]) -> str:
        if found[0] == "$${":
            return "${"
        name, closed = found[1], found[2]
        if not closed or not _NAME.fullmatch(name):
            raise XloomError(
                "invalid_settings",
                f"{path}: {found[0]!r} names no environment variable.",
                "Write ${NAME}, without a default; $${ stands for a plain ${.",
            )
        if name not in environment:
            raise XloomError(
                "invalid_settings",
                f"{path}: the environment variable {name} is not set.",
                f"Set {name} where this runs, or write $${{{name}}} if the text itself is meant.",
            )
        return environment[name]

    return _VARIABLE.sub(value_of, data)


def without_variables(data: Any) -> Any:
    """Data which `with_variables` gives back as it is here."""
    if isinstance(data, Mapping):
        return {key: without_variables(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_variables(value) for value in data]
    return data.replace("${", "$${") if isinstance(data, str) else data


def with_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The data with relative local paths taken from the settings file's own folder: wherever a worker runs, it runs
    elsewhere than the command that read them.
    """

    def is_ours(name: str, value: str) -> bool:
        # The name of a source that has no dot in front may be the hub's, and is a folder's if there is one.
        is_folder = name == "source" and value.strip() != "" and os.path.isdir(folder / value)
        return value.startswith(".") or is_folder or _is_text_file(name, value)

    def resolve(entry: Any, *names: str) -> Any:
        if not isinstance(entry, dict):
            return entry
        found = {name: entry[name] for name in names if isinstance(entry.get(name), str)}
        ours = {name: value for name, value in found.items() if is_ours(name, value)}
        return entry | {name: str((folder / value).resolve()) for name, value in ours.items()}

    made = dict(data)
    for section, names in _PATHS.items():
        if isinstance(data.get(section), list):
            made[section] = [resolve(entry, *names) for entry in data[section]]
        elif section in data:
            made[section] = resolve(data[section], *names)
    if isinstance(made.get("mixtures"), list):
        listed = data["adapters"] if isinstance(data.get("adapters"), list) else []
        known = [each["name"] for each in listed if isinstance(each, dict) and isinstance(each.get("name"), str)]

        def adapter(each: Any) -> Any:
            return each if each in known else resolve({"source": each}, "source")["source"]

        def mixture(entry: Any) -> Any:
            if not isinstance(entry, dict):
                return entry
            lists = [key for key in ("adapters", "subtract") if isinstance(entry.get(key), list)]
            return entry | {key: list(map(adapter, entry[key])) for key in lists}

        made["mixtures"] = list(map(mixture, made["mixtures"]))
    store = made.get("store")
    if isinstance(store, dict) and isinstance(store.get("sources"), list):
        prefixes = [resolve({"source": prefix}, "source")["source"] for prefix in store["sources"]]
        made["store"] = store | {"sources": prefixes}
    router = made.get("router")
    if isinstance(router, dict) and "front_end_args" in router:
        made["router"] = router | {"front_end_args": resolve(router["front_end_args"], "chat_template")}
    return made


def _is_text_file(key: str, value: str) -> bool:
    """A calibration text's name needs no dot in front to be told from a dataset's."""
    return key == "calibration" and value.endswith(TEXT_FILES) and not value.startswith("~")
