"""Which modules an adapter adapts: what its configuration says, and how its file's names become the base model's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xloom.protocol import XloomError, some_of

PREFIX = "base_model.model."
# Wrappers that training puts around modules: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_XLORA_PREFIX = "base_model.lora_model.model."  # of PEFT's X-LoRA, 0.13 to 0.21
# What may still stand before a module's name: DistributedDataParallel inside, a model wrapped twice.
_LEADING = ("module.", PREFIX, "model.")


def plain_name(key: str) -> str:
    """A tensor's name without PEFT's prefix and without the parts that wrappers of training left in it."""
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS).removeprefix("module.")
    return name.removeprefix(PREFIX).removeprefix(_XLORA_PREFIX)


def possible_names(name: str) -> Iterator[str]:
    """A module's or tensor's name, then without what may stand before it, one part after the other."""
    short: str | None = name
    while short is not None:
        yield short
        short = next((short.removeprefix(part) for part in _LEADING if short.startswith(part)), None)


def base_name(name: str, modules: Iterable[str]) -> str:
    """The base model's name for a module; the name as it is when the base model has no such module."""
    known = set(modules)
    return next((short for short in possible_names(name) if short in known), name)


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts LoRA on a linear module (peft.tuners.tuners_utils.check_target_module_exists, 0.21)."""
    excluded = config.get("exclude_modules")
    if excluded and (
        re.fullmatch(excluded, module) if isinstance(excluded, str) else any(_names(e, module) for e in excluded)
    ):
        return False
    targets = config["target_modules"]
    if isinstance(targets, str):
        if targets.lower() == "all-linear":  # all but the output layer, which lies in no numbered layer
            return any(part.isdigit() for part in module.split("."))
        return re.fullmatch(targets, module) is not None
    return any(_names(target, module) for target in targets) and _in_layers(config, module)


def _names(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for each in expressions if (match := re.match(each, module))), None)
    return found is not None and int(found[1]) in (layers if isinstance(layers, list) else [layers])


def check_targets(folder: Path, config: Mapping[str, Any], held: Iterable[str], modules: Iterable[str]) -> None:
    """Hold what the configuration targets among the base model's linears against what the file holds.

    PEFT leaves what the file lacks at its initial value, and drops what is not targeted; either way the adapter is not
    what was trained. Raises `XloomError` (broken_adapter).
    """
    if config.get("target_modules") is None:  # PEFT then has a list for each architecture; what it saves says it
        return
    held, modules = set(held), set(modules)
    if not held <= modules:  # of another base model, which says more than what is missing of this one
        return
    wanted = {module for module in modules if is_targeted(config, module)}
    if missing := sorted(wanted - held):
        message = f"{folder} lacks {some_of(missing, 3)}, which its target_modules names."
        cure = "Save the adapter whole (no filter on names), or correct target_modules if these were never trained."
        raise XloomError("broken_adapter", message, cure)
    if surplus := sorted(held - wanted):
        message = f"{folder} holds {some_of(surplus, 3)}, which its target_modules does not name."
        raise XloomError("broken_adapter", message, "PEFT would leave them out: correct target_modules.")
    targets = config["target_modules"]
    if not isinstance(targets, str):
        for target in targets:
            if not any(_names(target, module) for module in held):
                message = f"{folder}: target_modules names {target!r}, for which the file holds nothing."
                raise XloomError("broken_adapter", message, "Take it out of target_modules if it was never trained.")
