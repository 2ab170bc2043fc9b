"""What a training is asked to do, and the refusals that need nothing loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xloom.compose.checkpoint import FILE, PART
from xloom.compose.options import ROUTINGS, Options
from xloom.compose.text import MIXED, fingerprint
from xloom.protocol import XloomError
from xloom.settings import ModelSettings

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Plan:
    """Adapters (or a bundle to learn from), text by adapter, and where the result goes."""

    base: ModelSettings
    adapters: Mapping[str, Path]  # local folders
    text: Mapping[str, str]
    mixed: str | None
    out: Path
    bundle: Path | None = None  # to learn from; its adapters are those
    root: Path | None = None  # what the bundle's paths stay within
    device: str | None = None
    options: Options = field(default_factory=Options)

    def check(self) -> None:
        """Refuse what can't work. Raises `XloomError`: invalid_composition, missing_text, folder_not_empty."""
        self._check_options()
        if self.bundle is None:
            self._check_adapters()
        elif not self.text and self.mixed is None:
            raise XloomError("missing_text", "There is no text to learn on.", "Give --text NAME=FILE or --mixed FILE.")
        if MIXED in self.text:
            message = f"{MIXED!r} names the rows of several domains, not one of them."
            raise XloomError("invalid_composition", message, "Give such text by --mixed.")
        there = {entry.name for entry in self.out.iterdir()} - {PART} if self.out.is_dir() else set()
        if there and FILE not in there:
            message = f"{self.out} is not empty, and holds no checkpoint to go on from."
            raise XloomError("folder_not_empty", message, "Name a new folder with --out.")

    def _check_adapters(self) -> None:
        if len(self.adapters) < 2:
            message = f"A mixture is of two adapters or more; given: {len(self.adapters)}."
            raise XloomError("invalid_composition", message, "Give --adapters NAME=FOLDER NAME=FOLDER.")
        for name in self.adapters:
            if not _NAME.fullmatch(name) or name == MIXED:
                message = f"{name!r} can't name an adapter here."
                raise XloomError("invalid_composition", message, "Letters, digits, _ . and -, and not mixed.")
        if lacking := [name for name in self.adapters if name not in self.text]:
            message = f"There is no text for {', '.join(lacking)}: a router learns each adapter's domain from its text."
            raise XloomError("missing_text", message, f"Add --text {lacking[0]}=FILE.jsonl.")
        if strange := [name for name in self.text if name not in self.adapters]:
            message = f"There is text for {', '.join(strange)}, and no such adapter."
            cure = "Name texts as the adapters; give text of many kinds by --mixed."
            raise XloomError("invalid_composition", message, cure)

    def _check_options(self) -> None:
        options = self.options
        least = {
            "depth": 1,
            "size": 1,
            "steps": 0,
            "fitted_rows": 1,
            "tune": 0,
            "batch": 1,
            "length": 16,
            "held_out_rows": 1,
        }
        for name, lowest in least.items():
            if (value := getattr(options, name)) < lowest:
                raise _wrong(name, value, f"It must be {lowest} or more.")
        if not options.temperature > 0:
            raise _wrong("temperature", options.temperature, "It must be above 0.")
        if not 0 < options.learning_rate < 10:
            raise _wrong("learning_rate", options.learning_rate, "It must be above 0, and below 10.")
        if not 0 <= options.domain_share < 100:
            raise _wrong("domain_share", options.domain_share, "It must be 0 or more.")
        if options.routing not in ROUTINGS:
            raise _wrong("routing", options.routing, f"It is one of {', '.join(ROUTINGS)}.")
        if self.bundle is not None and options.routing != "linear":
            raise _wrong("routing", options.routing, "What is learned from a bundle is linear.")
        if self.bundle is None and options.tune:
            raise _wrong("tune", options.tune, "It goes with --distil; --steps says how long a router trains.")

    def run(self) -> str:
        """A hash of all that decides the training's course: what a checkpoint is held against."""
        folders = self.adapters if self.bundle is None else {"": self.bundle, **self.adapters}
        said: dict[str, Any] = {
            "base": [self.base.source, self.base.revision],
            "options": dataclasses.asdict(self.options),
            "adapters": {name: _digest(folder) for name, folder in folders.items()},
            "text": {name: fingerprint(name, text) for name, text in self.text.items()},
            "mixed": None if self.mixed is None else fingerprint(MIXED, self.mixed),
            "distil": self.bundle is not None,
        }
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".safetensors"):
            found.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def _wrong(name: str, value: object, cure: str) -> XloomError:
    return XloomError("invalid_composition", f"{name.replace('_', ' ')} is {value}.", cure)
