"""What a store actor is: the code it runs and what it was told. A deployment with another has it replaced."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def identity_of(*arguments: Any) -> str:
    """A digest of xloom's sources as they lie on this machine, and of what an `AdapterStore` is made with."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode())
        digest.update(file.read_bytes())
    digest.update(repr(arguments).encode())
    return digest.hexdigest()
