"""The adapters a bundle's configuration names outside its own folder: fetched to where the bundle reader finds them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

from xloom.adapters import sources
from xloom.adapters.source_rules import SourceRules, beside, is_local
from xloom.protocol import XloomError

_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]*")


def fetch_companions(source: str, folder: Path, rules: SourceRules) -> None:
    """Bring in what the bundle copied from `source` to `folder` names beside it, by relative or absolute path.

    `../x` lands beside `folder`; what has an absolute path, as `PeftModel.from_pretrained` is often given, lands in
    `adapters/<name>`. Only a local source may name absolute paths. The rules hold for each of them. Raises `XloomError`
    as `sources.fetch` does.
    """
    from xloom.mixtures.files import read_json

    names = ("router_config.json", "xlora_config.json", "adapter_config.json")
    file = next((folder / name for name in names if (folder / name).is_file()), folder / names[-1])
    config = read_json(file, "broken_bundle")
    adapters, trained = config.get("adapters"), bool(config.get("use_trainable_adapters", False))
    if not isinstance(adapters, dict):
        return
    local = is_local(source)
    for number, (name, path) in enumerate(adapters.items()):
        if not isinstance(path, str) or (folder / path).resolve().is_relative_to(folder.resolve()):
            continue
        places = (folder / str(number), folder / "adapters" / name, folder / name)
        inside = any((place / "adapter_config.json").is_file() for place in places)
        if PurePosixPath(path).is_absolute():
            # The sub-folders that PEFT saves beside these paths are often damaged; they count where it trained them.
            healthy = not trained and Path(path, "adapter_config.json").is_file()
            if local and (healthy or not inside) and _PLAIN.fullmatch(name):
                sources.fetch(path, folder / "adapters" / name, rules)
            continue
        parts = PurePosixPath(posixpath.normpath(path)).parts
        if len(parts) < 2 or parts[0] != ".." or ".." in parts[1:]:
            raise XloomError(
                "unsafe_path",
                f"The bundle {source!r} names an adapter at {path!r}, further out than beside it.",
                "Keep a bundle's adapters beside it or inside it.",
            )
        address = beside(source, "/".join(parts[1:]))
        if address is not None:
            sources.fetch(address, folder.parent.joinpath(*parts[1:]), rules)
