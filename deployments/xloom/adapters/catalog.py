"""The catalog: takes adapters in from their sources, keeps them prepared on disk, and knows the desired state."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import msgspec

from xloom.adapters import sources
from xloom.adapters.companions import fetch_companions
from xloom.adapters.manifest import (
    Entry,
    Manifest,
    ManifestFile,
    adapter_names,
    folder_generation,
    generation_of,
    read_files,
)
from xloom.adapters.request_mixtures import request_mixture_name
from xloom.adapters.source_rules import SourceRules
from xloom.adapters.validation import base_shape, check_name, check_overrides, detect_kind
from xloom.protocol import NO_OVERRIDES, Blend, Overrides, XloomError, adapter_number
from xloom.storage.durable import sync, sync_tree

if TYPE_CHECKING:
    from xloom.mixtures.stacking import Prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Staged:
    """A prepared adapter not yet in the catalog: its entry, and the folder that is to become its generation's."""

    entry: Entry
    folder: Path
    rules: SourceRules | None = None  # under which its source was read


class AdapterCatalog:
    """The adapters of one base model, under one folder, which one process owns.

    `manifest.json` names the entries; `prepared/<generation>/` holds what replicas load; `incoming/` is scratch.
    `stage` is slow and may run in several threads at once; `commit` and `remove` are quick. A failure at any
    point, a crash included, leaves the manifest as it was or as it was to be, never between. What a replacement
    took the place of is kept as long as this process lives, so that `revert` can bring it back.
    """

    def __init__(
        self,
        folder: Path,
        base_source: str,
        max_rank: int,
        reserved_names: Collection[str] = (),
        base_revision: str | None = None,
    ) -> None:
        self._base = (base_source, base_revision)
        self._max_rank = max_rank
        self._reserved = frozenset(reserved_names)
        self._prepared = folder / "prepared"
        self._incoming = folder / "incoming"
        self._changing = Lock()
        self._preparing = Lock()  # sources are fetched side by side; the weights of one at a time are in memory
        self._replaced: dict[str, Entry] = {}  # by name: what the newest replacement took the place of
        self._rules: dict[str, SourceRules | None] = {}  # by key: those of what was added in this process's life
        self._prepared.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._incoming, ignore_errors=True)  # of an add that a crash cut short
        self._incoming.mkdir()
        self._file = ManifestFile(folder)
        self._manifest = self._with_adapters(self._file.load())
        self._drop_missing()
        self._collect()

    @property
    def manifest(self) -> Manifest:
        """The desired state."""
        return self._manifest

    @property
    def version(self) -> int:
        """Grows with each change."""
        return self._manifest.version

    def entries(self) -> tuple[Entry, ...]:
        """All adapters, bundles and mixtures that have names."""
        return self._manifest.named

    def add(
        self,
        name: str,
        source: str,
        kind: str | None = None,
        overrides: Overrides = NO_OVERRIDES,
        *,
        replace: bool = False,
        max_rank: int | None = None,
        verify: bool = False,
        configured: bool = False,
        rules: SourceRules | None = None,
        blend: Blend | None = None,
    ) -> Entry:
        """Take an adapter or bundle in (`kind` None: whichever it is). Raises `XloomError` and changes nothing.

        Adding what is there already changes nothing; other content under the same name is adapter_exists
        unless `replace`.
        """
        flags = {"verify": verify, "configured": configured}
        with self.stage(name, source, kind, overrides, **flags, rules=rules, blend=blend) as staged:
            return self.commit(staged, replace=replace, max_rank=max_rank)

    @contextmanager
    def stage(
        self,
        name: str,
        source: str,
        kind: str | None,
        overrides: Overrides,
        *,
        verify: bool = False,
        configured: bool = False,
        rules: SourceRules | None = None,
        blend: Blend | None = None,
    ) -> Iterator[Staged]:
        """Fetch, check and prepare a source; what is not committed within the block is deleted.

        `rules` None: any source, for the settings' own and for commands of this machine's user. A `blend` is a mixture
        of adapters, whose own sources are read instead.
        """
        check_name(name, self._reserved)
        with self._work() as (scratch, prepared):
            fetched = scratch / "fetched"  # what a bundle names as ../x comes to lie in `scratch`
            if blend is not None:
                kind, result = blend.routing, self._mix(blend, scratch, prepared, rules)
            else:
                sources.fetch(source, fetched, rules)
                with _speaking_of(source, fetched):
                    found = sources.adapter_folder(fetched, source)
                    kind = detect_kind(found, source, kind)
                    check_overrides(kind, overrides)
                    result = self._prepare(source, fetched, found, kind, overrides, prepared, rules)
            entry = _entry(name, kind, source, prepared, result)
            flags = {"verify": verify, "configured": configured}
            entry = msgspec.structs.replace(entry, overrides=overrides, blend=blend, **flags)
            yield Staged(entry, prepared, rules)

    @contextmanager
    def gather(self, parts: Mapping[str, str], max_rank: int) -> Iterator[Staged]:
        """As `stage`, of entries that are here (name -> generation): what requests with weights of their own use.

        Of adapters their stack, in the order of their names; of one mixture its stack with constants for gates.
        `max_rank` is what the engines that run have room for. Raises `XloomError`.
        """
        from xloom.mixtures.prepare_mixture import prepare_request_mixture, with_constant_gates

        with self._work() as (scratch, prepared):
            copies = self._copies_of(parts, scratch)
            names = sorted(copies)
            with self._preparing:
                if len(names) == 1 and adapter_names(copies[names[0]]):
                    result = with_constant_gates(copies[names[0]], prepared)
                else:
                    modules, rank = base_shape(*self._base).modules, min(max_rank, self._max_rank)
                    folders = {name: copies[name] for name in names}
                    result = prepare_request_mixture(folders, modules, prepared, max_rank=rank)
            entry = _entry(request_mixture_name(parts), "fixed", ", ".join(names), prepared, result)
            yield Staged(msgspec.structs.replace(entry, parts=dict(parts)), prepared)

    @contextmanager
    def _work(self) -> Iterator[tuple[Path, Path]]:
        """A folder for what is fetched, and one for what is prepared, for as long as the block takes."""
        scratch = self._incoming / uuid.uuid4().hex
        prepared = scratch / "prepared"
        prepared.mkdir(parents=True)
        try:
            yield scratch / "source", prepared
        except OSError as error:
            raise _unwritable(self._prepared.parent, error) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _mix(self, blend: Blend, scratch: Path, out: Path, rules: SourceRules | None) -> Prepared:
        from xloom.mixtures.base_weights import BaseWeights
        from xloom.mixtures.prepare_mixture import prepare_mixture

        copies = self._copies_of(blend.generations, scratch / "copies")
        folders, spoken = {}, ExitStack()
        with spoken:
            for number, (name, source) in enumerate(blend.sources.items()):
                if name in copies:
                    folders[name] = copies[name]
                    continue
                fetched = scratch / str(number)
                sources.fetch(source, fetched, rules)
                spoken.enter_context(_speaking_of(source, fetched))
                folders[name] = sources.adapter_folder(fetched, source)
                detect_kind(folders[name], source, "lora")
            base = base_shape(*self._base)
            with self._preparing:
                weights = BaseWeights(*self._base)
                return prepare_mixture(blend, folders, base.modules, out, max_rank=self._max_rank, base=weights)

    def _copies_of(self, parts: Mapping[str, str], folder: Path) -> dict[str, Path]:
        """Copies (links) of prepared entries, which stay when those are removed meanwhile.

        Raises `XloomError`: adapter_superseded, generation_damaged.
        """
        found = {}
        with self._changing:
            for number, (name, generation) in enumerate(parts.items()):
                entry = self._manifest.get(name)
                if entry is None or entry.generation != generation:
                    message = f"{name!r} was replaced or removed meanwhile."
                    raise XloomError("adapter_superseded", message, "Send it again.", 409)
                found[name] = folder / str(number)
                found[name].mkdir(parents=True)
                for file in (self._prepared / generation).iterdir():
                    os.link(file, found[name] / file.name)
        for name, generation in parts.items():
            if folder_generation(found[name]) != generation:
                raise _damaged(generation, "damaged on disk")
        return found

    def _prepare(
        self,
        source: str,
        fetched: Path,
        found: Path,
        kind: str,
        overrides: Overrides,
        out: Path,
        rules: SourceRules | None,
    ) -> Prepared:
        # Imported here: without torch a store that has crashed is back in half the time.
        from xloom.mixtures.base_weights import BaseWeights
        from xloom.mixtures.prepare import prepare_bundle, prepare_lora
        from xloom.mixtures.prepare_mixture import prepare_linear

        base, weights = base_shape(*self._base), BaseWeights(*self._base)
        if kind == "lora":
            with self._preparing:
                return prepare_lora(found, base.modules, out, max_rank=self._max_rank, base=weights)
        if found != fetched:
            source = f"{source.rstrip('/')}/{found.relative_to(fetched).as_posix()}"
        fetch_companions(source, found, rules or SourceRules())
        if kind == "linear":
            with self._preparing:
                return prepare_linear(
                    found, base.modules, out, max_rank=self._max_rank, root=fetched.parent, base=weights
                )
        with self._preparing:
            return prepare_bundle(
                found,
                base.modules,
                out,
                hidden_size=base.hidden_size,
                max_rank=self._max_rank,
                overrides=overrides,
                base=weights,
                root=fetched.parent,  # absolute paths in a bundle reach nothing outside what was fetched
            )

    def commit(
        self, staged: Staged, *, replace: bool = False, max_rank: int | None = None, mixtures: bool = True
    ) -> Entry:
        """Make a staged adapter part of the desired state.

        `max_rank` is what the engines that run now have room for; None: none run yet. Those that run hold what is
        here already unproved, so that they can't be asked to prove it. `mixtures`: whether they serve bundles.
        Raises `XloomError`: adapter_exists, adapter_number_taken, rank_too_large, unsupported_by_backend.
        """
        entry = staged.entry
        if entry.ref.is_mixture and not mixtures:
            raise XloomError(
                "unsupported_by_backend",
                f"{entry.name!r} is a mixture, and these engines were started without mixtures.",
                "Set engine.enable_xlora: true, with engine.backend vllm or transformers, and start again.",
            )
        if max_rank is not None and entry.rank > max_rank:
            raise XloomError(
                "rank_too_large",
                f"The rank of {entry.name!r} is {entry.rank}; these engines take up to {max_rank}.",
                "Raise engine.max_lora_rank and start again.",
            )
        with self._changing:
            old = self._manifest.get(entry.name)
            if old is not None and old.generation == entry.generation:
                self._put(staged)
                return self._with_flags(old, entry, running=max_rank is not None)
            if old is not None and not replace:
                raise XloomError(
                    "adapter_exists",
                    f"{entry.name!r} exists already, with other content (from {old.source!r}).",
                    "Remove it first, replace it, or choose another name.",
                    409,
                )
            self._check_number(entry)
            kept = self._replaced
            try:
                self._put(staged)
                self._replaced = kept | ({entry.name: old} if old else {})
                self._rules[entry.key] = staged.rules
                self._change(self._manifest.with_entry(entry))
            except OSError as error:
                self._replaced = kept
                self._collect()
                raise _unwritable(self._prepared.parent, error) from None
            return entry

    def _put(self, staged: Staged) -> None:
        """Make a staged folder its generation's, unless that is there and whole."""
        target = self._prepared / staged.entry.generation
        if target.is_dir():
            if folder_generation(target) == target.name:
                return
            logger.warning("the files of %s were damaged: they are replaced", staged.entry.key)
            shutil.rmtree(target)
        sync_tree(staged.folder)
        os.replace(staged.folder, target)
        sync(self._prepared)

    def _check_number(self, entry: Entry) -> None:
        """Engines tell adapters apart by a number of 31 bits: two that share one would be served as each other."""
        number = adapter_number(entry.key)
        for other in (*self._manifest.entries, *self._replaced.values()):
            if other.key != entry.key and adapter_number(other.key) == number:
                raise XloomError(
                    "adapter_number_taken",
                    f"{entry.name!r} would have the number that {other.name!r} has inside the engines.",
                    "Choose another name for it.",
                    409,
                )

    def _with_flags(self, entry: Entry, wanted: Entry, *, running: bool) -> Entry:
        """An entry that is there: configured from now on, to be proved or not by engines that start from now on."""
        configured = entry.configured or wanted.configured
        verify = entry.verify if running and not wanted.verify else wanted.verify
        if (verify, configured) == (entry.verify, entry.configured):
            return entry
        if running and verify != entry.verify:
            raise XloomError(
                "adapter_exists",
                f"{entry.name!r} is served already, and was not verified.",
                "Remove it first: it is verified when a replica loads it.",
                409,
            )
        entry = msgspec.structs.replace(entry, verify=verify, configured=configured)
        self._change(self._manifest.with_entry(entry))
        return entry

    def remove(self, name: str) -> Entry:
        """Take an adapter out, and its files once no entry needs them. Raises `XloomError` (adapter_not_found)."""
        with self._changing:
            entry = self._manifest.get(name)
            if entry is None:
                raise XloomError(
                    "adapter_not_found",
                    f"There is no adapter {name[:80]!r}.",
                    "See the list of adapters for those there are.",
                    404,
                )
            self._replaced.pop(name, None)
            self._change(self._manifest.without(name))
            return entry

    def prune(self, names: Collection[str]) -> list[Entry]:
        """Take out what a settings file once named and `names` lacks; what was added at run time stays.

        What requests asked for of an earlier deployment goes, too.
        """
        with self._changing:
            left = [entry for entry in self._manifest.named if entry.configured and entry.name not in names]
            for entry in left:
                self._replaced.pop(entry.name, None)
            gone = [entry.name for entry in left] + list(self._manifest.of_requests)
            if gone:
                self._change(self._manifest.without(*gone))
            return left

    def drop(self, names: Collection[str]) -> None:
        """Take out what requests asked for and use no more."""
        with self._changing:
            if gone := [name for name in names if name in self._manifest.of_requests]:
                self._change(self._manifest.without(*gone))

    def revert(self, name: str, generation: str) -> Entry | None:
        """Undo the add of an entry: what it replaced comes back, else it is removed. None when it is there no more."""
        with self._changing:
            entry = self._manifest.get(name)
            if entry is None or entry.generation != generation:
                return None
            old = self._replaced.pop(name, None)
            self._change(self._manifest.with_entry(old) if old else self._manifest.without(name))
            return entry

    def files(self, generation: str) -> dict[str, bytes]:
        """A generation's prepared files by name. Raises `XloomError` (generation_not_found, generation_damaged)."""
        if all(entry.generation != generation for entry in self._manifest.entries):
            raise _no_generation(generation)
        try:
            files = read_files(self._prepared / generation)
        except FileNotFoundError:  # removed meanwhile, or lost
            if all(entry.generation != generation for entry in self._manifest.entries):
                raise _no_generation(generation) from None
            files = {}
        if generation_of(files) != generation:
            raise _damaged(generation, "damaged on disk")
        return files

    def mend(self, generation: str) -> None:
        """Fetch a generation that is damaged on disk from its source again, and put it in its place.

        Raises `XloomError`: generation_not_found, generation_damaged (its source is gone, or is another by now).
        """
        entry = next((entry for entry in self._manifest.entries if entry.generation == generation), None)
        if entry is None:
            raise _no_generation(generation)
        try:
            rules = self._rules.get(entry.key)
            if entry.parts:
                again = self.gather(entry.parts, self._max_rank)
            else:
                source = (entry.name, entry.source, entry.kind, entry.overrides)
                again = self.stage(*source, rules=rules, blend=entry.blend)
            with again as staged:
                if staged.entry.generation != generation:
                    raise _damaged(generation, f"damaged on disk, and {entry.source!r} has other content by now")
                with self._changing:
                    self._put(staged)
                    self._collect()  # it may have been removed meanwhile
        except XloomError as error:
            if error.code == "generation_damaged":
                raise
            raise _damaged(generation, f"damaged on disk, and can't be had from its source again: {error}") from None

    def _change(self, manifest: Manifest) -> None:
        manifest = manifest.whole
        self._file.save(manifest)
        self._manifest = manifest
        self._collect()

    def _with_adapters(self, manifest: Manifest) -> Manifest:
        """What was written before entries said the names of a mixture's adapters."""

        def told(entry: Entry) -> Entry:
            if entry.adapters or not entry.ref.is_mixture:
                return entry
            return msgspec.structs.replace(entry, adapters=adapter_names(self._prepared / entry.generation))

        return Manifest(manifest.version, tuple(map(told, manifest.entries)))

    def _collect(self) -> None:
        """Delete the generations that no entry names, nor one that may come back."""
        named = {entry.generation for entry in (*self._manifest.entries, *self._replaced.values())}
        for folder in self._prepared.iterdir():
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def _drop_missing(self) -> None:
        missing = [entry for entry in self._manifest.entries if not (self._prepared / entry.generation).is_dir()]
        for entry in missing:
            logger.error("the files of %s are gone: it is dropped; add it again from %s", entry.key, entry.source)
            self._manifest = self._manifest.without(entry.name)
        if missing:
            self._file.save(self._manifest)


def _entry(name: str, kind: str, source: str, prepared: Path, result: Prepared) -> Entry:
    return Entry(
        name=name,
        kind=kind,
        generation=folder_generation(prepared),
        rank=result.rank,
        targets=result.targets,
        size=result.size,
        source=source,
        added_at=time.time(),
        adapters=adapter_names(prepared),
    )


@contextmanager
def _speaking_of(source: str, folder: Path) -> Iterator[None]:
    """Name the user's source in errors, in place of the scratch folder it was copied to."""
    try:
        yield
    except XloomError as error:
        message = error.message.replace(str(folder), source)
        raise XloomError(error.code, message, error.cure, error.status) from None


def _no_generation(generation: str) -> XloomError:
    return XloomError("generation_not_found", f"No adapter is at generation {generation[:64]!r}.", status=404)


def _damaged(generation: str, how: str) -> XloomError:
    cure = "Add the adapter again, in place of what is there."
    return XloomError("generation_damaged", f"The store's files of generation {generation} are {how}.", cure, 500)


def _unwritable(folder: Path, error: OSError) -> XloomError:
    return XloomError(
        "store_unwritable",
        f"The adapter store's folder {folder} failed: {error}.",
        "Free disk space there, or set store.path to another folder.",
        500,
    )
