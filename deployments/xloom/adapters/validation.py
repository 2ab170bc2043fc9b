"""What may enter the store: names, kinds, and how an adapter must fit the base model."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

from xloom.protocol import Overrides, XloomError
from xloom.settings import NAME_PATTERN

# xloom.mixtures and transformers are imported where they are used: a store that only hands out needs no torch.
_IMPORTING = Lock()  # transformers' lazy module fails when two threads first import from it at once (5.19)


@dataclass(frozen=True)
class BaseShape:
    """What of the base model adapters are held against: linear modules as name -> (out, in), and the hidden size."""

    modules: dict[str, tuple[int, int]]
    hidden_size: int


def base_shape(source: str, revision: str | None = None) -> BaseShape:
    """The shape of a base model, from its configuration alone. Raises `XloomError` (unreadable_model)."""
    with _IMPORTING:
        return _base_shape(source, revision)


@lru_cache(maxsize=4)
def _base_shape(source: str, revision: str | None) -> BaseShape:
    from xloom.mixtures.modules import linear_modules

    modules = linear_modules(source, revision)
    from transformers import AutoConfig  # readable: linear_modules has just read it

    config = AutoConfig.from_pretrained(source, revision=revision)
    return BaseShape(modules, int(config.get_text_config().hidden_size))


def check_name(name: str, reserved: Collection[str]) -> None:
    """Refuse names with path parts and the like, and those taken by others. Raises `XloomError`."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise XloomError(
            "invalid_adapter_name",
            f"{name[:80]!r} can't name an adapter.",
            "Use up to 64 letters, digits, dots, dashes and underscores, a letter or digit first; or org/name.",
        )
    if name in reserved:
        raise XloomError("name_reserved", f"The name {name!r} is that of the base model.", "Choose another.", 409)


def detect_kind(folder: Path, source: str, wanted: str | None) -> str:
    """What a folder is, "lora", "xlora" or "linear". Raises `XloomError` (wrong_kind) when `wanted` is another.

    A learned linear router is a bundle as well: it may stand where bundles are listed.
    """
    from xloom.mixtures.bundle import is_bundle
    from xloom.mixtures.linear_router import is_linear_router

    found = "linear" if is_linear_router(folder) else "xlora" if is_bundle(folder) else "lora"
    if wanted not in (None, "lora", "xlora", "linear"):
        raise XloomError("wrong_kind", f"There is no adapter kind {wanted!r}.", "Kinds are lora, xlora and linear.")
    if wanted is not None and wanted != found and (wanted, found) != ("xlora", "linear"):
        names = {"lora": "a LoRA adapter", "xlora": "an X-LoRA bundle", "linear": "a learned linear router"}
        raise XloomError(
            "wrong_kind",
            f"The source {source!r} is {names[found]}, not {names[wanted]}.",
            "List LoRA adapters under adapters and bundles under xlora.",
        )
    return found


def check_overrides(kind: str, overrides: Overrides) -> None:
    """Refuse X-LoRA's routing overrides on what is none. Raises `XloomError` (invalid_override)."""
    if kind != "xlora" and overrides != Overrides():
        what = "a LoRA adapter" if kind == "lora" else "a learned linear router"
        raise XloomError(
            "invalid_override",
            f"{', '.join(Overrides.__struct_fields__)} are for X-LoRA bundles; this is {what}.",
            "Leave them out.",
        )
