"""The desired state: which adapters and bundles exist, at which generation. Kept on disk in two copies."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from xloom.mixtures.options import XLORA_FILE
from xloom.protocol import NO_OVERRIDES, AdapterRef, Blend, Overrides, XloomError, adapter_key
from xloom.storage.durable import sync, write_synced

logger = logging.getLogger(__name__)

_PIECE = 2**20  # bytes


class Entry(msgspec.Struct, frozen=True):
    """One adapter or bundle, prepared and ready to be fetched."""

    name: str
    kind: str  # "lora", or a mixture's routing
    generation: str  # `generation_of` its prepared files
    rank: int  # of a bundle: the largest sum of its adapters' ranks over the modules
    targets: tuple[str, ...]  # kinds of module: q_proj, down_proj...
    size: int  # bytes
    source: str
    overrides: Overrides = NO_OVERRIDES
    added_at: float = 0.0  # seconds since the epoch
    verify: bool = False  # whether a replica has to prove it before it serves it
    configured: bool = False  # named by a settings file, which takes it out again when it names it no more
    blend: Blend | None = None  # of a mixture of adapters: what it is made of
    adapters: tuple[str, ...] = ()  # of a mixture: the names of its adapters, in stacking order
    parts: dict[str, str] = {}  # of one that requests asked for: what it is stacked of, name -> generation

    @property
    def ref(self) -> AdapterRef:
        """How requests name it."""
        return AdapterRef(self.name, self.generation, self.kind)

    @property
    def key(self) -> str:
        """How replicas report it."""
        return self.ref.key


class Manifest(msgspec.Struct, frozen=True):
    """All entries, in the order they were added; the version grows with each change."""

    version: int = 0
    entries: tuple[Entry, ...] = ()

    def get(self, name: str) -> Entry | None:
        """The entry of this name."""
        return next((entry for entry in self.entries if entry.name == name), None)

    @property
    def named(self) -> tuple[Entry, ...]:
        """The entries that have names for people: all but those that requests asked for by weights."""
        return tuple(entry for entry in self.entries if not entry.ref.of_requests)

    @property
    def of_requests(self) -> dict[str, Entry]:
        """Those that requests asked for by weights, by name."""
        return {entry.name: entry for entry in self.entries if entry.ref.of_requests}

    def with_entry(self, entry: Entry) -> Manifest:
        """The next version, with this entry added or in place of its namesake."""
        if self.get(entry.name):
            entries = tuple(entry if old.name == entry.name else old for old in self.entries)
        else:
            entries = (*self.entries, entry)
        return Manifest(self.version + 1, entries)

    def without(self, *names: str) -> Manifest:
        """The next version, with no entry of these names."""
        return Manifest(self.version + 1, tuple(entry for entry in self.entries if entry.name not in names))

    @property
    def whole(self) -> Manifest:
        """Without what requests asked for of adapters that are there no more, or in another version."""
        there = {entry.key for entry in self.entries}
        kept = tuple(
            entry for entry in self.entries if all(adapter_key(*part) in there for part in entry.parts.items())
        )
        return self if len(kept) == len(self.entries) else Manifest(self.version, kept)


def generation_of(files: Mapping[str, bytes]) -> str:
    """SHA-256 in hex over the files' names, lengths and contents, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def folder_generation(folder: Path) -> str:
    """`generation_of` the files right in a folder, without holding them in memory."""
    digest = hashlib.sha256()
    for path in sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def read_files(folder: Path) -> dict[str, bytes]:
    """All files right in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def adapter_names(prepared: Path) -> tuple[str, ...]:
    """The names of a prepared mixture's adapters, in stacking order; none of a plain adapter, or of what is damaged."""
    try:
        return tuple(map(str, json.loads((prepared / XLORA_FILE).read_text(encoding="utf-8"))["adapter_names"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


class ManifestFile:
    """The manifest on disk: `manifest.json`, and `manifest.json.bak`, written right after it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "manifest.json"
        self._backup = folder / "manifest.json.bak"

    def load(self) -> Manifest:
        """The stored manifest, empty when there is none. Raises `XloomError` (manifest_corrupt): no copy is whole."""
        if not self._path.exists() and not self._backup.exists():
            return Manifest()
        manifest = self._read(self._path)
        if manifest is not None:
            return manifest
        backup = self._read(self._backup)
        if backup is None:
            raise XloomError(
                "manifest_corrupt",
                f"Neither {self._path} nor its backup can be read.",
                "Restore one of them, or delete both to start with an empty store.",
                500,
            )
        logger.warning("%s is damaged: went back to %s, version %d", self._path, self._backup, backup.version)
        # The damaged copy may have been one version ahead; a number must never stand for two states.
        recovered = Manifest(backup.version + 2, backup.entries)
        self.save(recovered)
        return recovered

    def save(self, manifest: Manifest) -> None:
        """Replace both copies, one after the other, so that at any moment one is whole."""
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        for target in (self._path, self._backup):
            temporary = target.with_name(target.name + ".tmp")
            write_synced(temporary, data)
            os.replace(temporary, target)
            sync(target.parent)

    @staticmethod
    def _read(path: Path) -> Manifest | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Manifest)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            logger.warning("%s can't be read: %s", path, error)
            return None
