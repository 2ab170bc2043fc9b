"""Where adapters come from: a local folder, the Hugging Face hub, or any fsspec URL. Pickle is never copied."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from xloom.adapters.copying import Readable, copy
from xloom.adapters.limits import Budget, Limits
from xloom.adapters.source_rules import SourceRules, is_local, local_path, place
from xloom.protocol import XloomError

logger = logging.getLogger(__name__)

ALLOWED_SUFFIXES = (".json", ".safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
WEIGHT_STEMS = ("adapter_model", "xlora_classifier", "pytorch_model")

_READ_AHEAD = 8 * 2**20  # bytes
_CHECK_SOURCE = "Check the source's path or URL."


class Source(Protocol):
    """Copies what a source's address names into an empty folder. Raises `XloomError`."""

    def __call__(self, address: str, into: Path, budget: Budget) -> None: ...


Entry = TypeVar("Entry")

_SCHEMES: dict[str, Source] = {}


def register(scheme: str, source: Source) -> None:
    """Serve `scheme://` addresses by this function instead of fsspec's."""
    _SCHEMES[scheme] = source


def fetch(source: str, into: Path, rules: SourceRules | None = None) -> None:
    """Copy a source's JSON and safetensors files into `into`, sub-folders kept.

    Raises `XloomError`: source_not_allowed, source_not_found, source_unreachable, source_unsupported, source_too_large,
    source_too_slow, pickle_refused (weights as pickle), unsafe_path (a path or link that leaves the source),
    broken_adapter (a safetensors file that is none).
    """
    rules = rules or SourceRules()
    where = place(source)
    rules.check(source)
    into.mkdir(parents=True, exist_ok=True)
    budget = Budget(source, rules.limits, inner=rules.trusts_host(source))
    read = fetch_folder if is_local(source) else _SCHEMES.get(where.scheme, fetch_url)
    budget.run(lambda: read(source, into, budget))


def select(files: dict[str, int], source: str, limits: Limits) -> list[str]:
    """The files to copy among a source's (relative POSIX path to size in bytes). Raises `XloomError`."""
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise _unsafe_path(source, name)
    chosen = sorted(name for name in files if PurePosixPath(name).suffix in ALLOWED_SUFFIXES)
    _refuse_pickle(files, source)
    if not chosen:
        raise _not_found(source, "it holds no adapter files (JSON, safetensors)")
    size = sum(files[name] for name in chosen)
    if len(chosen) > limits.files or size > limits.size:
        raise XloomError(
            "source_too_large",
            f"The source {source!r} holds {len(chosen)} files of {size} bytes; "
            f"the limits are {limits.files} files and {limits.size} bytes.",
            "Name the folder of one adapter or bundle alone, or raise the limit in store.limits.",
        )
    return chosen


def _refuse_pickle(files: Iterable[str], source: str) -> None:
    paths = [PurePosixPath(name) for name in files]
    safe = {path.parent for path in paths if path.suffix == ".safetensors"}
    for path in sorted(path for path in paths if path.suffix in PICKLE_SUFFIXES):
        # Training leftovers such as optimizer.pt beside safetensors weights are left behind without a word.
        if not safe or (path.stem in WEIGHT_STEMS and path.parent not in safe):
            raise XloomError(
                "pickle_refused",
                f"The weights {str(path)!r} of {source!r} are a pickle file, which can run code when it is read.",
                "Save the adapter as safetensors (PEFT: save_pretrained(..., safe_serialization=True)).",
            )


def adapter_folder(fetched: Path, source: str) -> Path:
    """Where the adapter or bundle lies in what was fetched: right there, or in the one sub-folder that holds one.

    Raises `XloomError` (source_not_found) where several do.
    """
    names = ("adapter_config.json", "xlora_config.json", "router_config.json")
    if any((fetched / name).is_file() for name in names):
        return fetched
    found = {file.parent for name in names for file in fetched.rglob(name)}
    outermost = sorted(folder for folder in found if not found.intersection(folder.parents))
    if len(outermost) > 1:
        listed = ", ".join(folder.relative_to(fetched).as_posix() for folder in outermost[:5])
        raise _not_found(source, f"it holds {len(outermost)} adapters ({listed}): add the one's folder to the source")
    return outermost[0] if outermost else fetched


# Local folders.


def fetch_folder(address: str, into: Path, budget: Budget) -> None:
    """Copy a local folder (an absolute path or file:// URL).

    Links are followed within it, and into the blobs of the hub cache's repository that it is a snapshot of.
    """
    root = local_path(address)
    if not root.is_dir():
        raise _not_found(address, "there is no such folder")
    try:
        _copy_below(root, address, into, budget)
    except OSError as error:
        raise _unreachable(address, error) from None


def _copy_below(root: Path, source: str, into: Path, budget: Budget) -> None:
    found = _listed(root.resolve(), source, budget)
    for name in select({name: file.stat().st_size for name, file in found.items()}, source, budget.limits):
        with found[name].open("rb") as opened:
            copy(opened, into / name, found[name].stat().st_size, budget)


class _Local(NamedTuple):
    """A file or folder below a local source: its path there, where it really is, and the real folders above it."""

    path: Path
    real: Path
    above: frozenset[Path]


def _listed(root: Path, source: str, budget: Budget) -> dict[str, Path]:
    """Each file's relative POSIX path, and where it is when all links are followed."""

    def entries(folder: _Local) -> Iterator[_Local]:
        with os.scandir(folder.path) as found:
            for entry in found:
                # So Kubernetes names what holds that to which the links beside it lead (its AtomicWriter, 1.34).
                if folder.path != root or not entry.name.startswith(".."):
                    yield _Local(Path(entry.path), Path(os.path.realpath(entry.path)), folder.above | {folder.real})

    stores = [root, *_blobs(root)]
    files: dict[str, Path] = {}
    for path, real, above in _walk(_Local(root, root, frozenset()), entries, lambda entry: entry.real.is_dir(), budget):
        name = path.relative_to(root).as_posix()
        leaves = path.is_symlink() and not any(real.is_relative_to(store) for store in stores)
        if leaves or real in above:
            raise _unsafe_path(source, name)
        if real.is_file():
            files[name] = real
    return files


def _blobs(root: Path) -> list[Path]:
    """The blobs that a snapshot in the hub's cache is made of links to (huggingface_hub 1), if this is in one."""
    for snapshots in (parent for parent in root.parents if parent.name == "snapshots"):
        repository = snapshots.parent
        blobs = repository / "blobs"
        if repository.name.startswith(("models--", "datasets--")) and blobs.is_dir() and not blobs.is_symlink():
            return [blobs]
    return []


def _walk(
    root: Entry, entries: Callable[[Entry], Iterable[Entry]], is_folder: Callable[[Entry], bool], budget: Budget
) -> Iterator[Entry]:
    """All that is below a folder, within the limits. Without recursion: a tree may have no end."""
    folders = deque([(root, 0)])
    while folders:
        folder, depth = folders.popleft()
        for entry in entries(folder):
            budget.entry(depth)
            yield entry
            if is_folder(entry):
                folders.append((entry, depth + 1))


# fsspec URLs.


def fetch_url(address: str, into: Path, budget: Budget) -> None:
    """Copy a folder at any fsspec URL: s3://, gs://, az://, hdfs://, memory://…"""
    try:
        filesystem, root = _filesystem(address, budget)
    except ImportError as error:
        raise XloomError(
            "source_unsupported",
            f"Nothing installed reads {address!r}: {error}",
            "Install it: s3fs for s3://, gcsfs for gs://, adlfs for az://, aiohttp for http://.",
        ) from None
    except ValueError as error:
        raise XloomError("source_unsupported", f"{address!r}: {error}", _CHECK_SOURCE) from None
    ahead = 0 if _is_http(address) else _READ_AHEAD  # 0: one request, whatever the server says of ranges
    try:
        filesystem.invalidate_cache()  # listings are cached for the process's life: a source may have changed
        found = _found(filesystem, root, budget)
        if not found:
            raise _not_found(address, "there is no such folder, or it is empty")
        prefix = root.rstrip("/") + "/"
        for name in select(
            {path.removeprefix(prefix): size or 0 for path, size in found.items()}, address, budget.limits
        ):
            with filesystem.open(prefix + name, "rb", block_size=ahead) as file:
                copy(cast(Readable, file), into / name, found[prefix + name], budget)
    except XloomError:
        raise
    except FileNotFoundError:
        raise _not_found(address, "there is no such folder") from None
    except Exception as error:  # each filesystem library raises its own kinds
        raise _unreachable(address, error) from None


def _found(filesystem: Any, root: str, budget: Budget) -> dict[str, int | None]:
    """The files below a folder of a filesystem: path to size in bytes, None where it does not say."""
    below = root.rstrip("/") + "/"

    def entries(folder: dict[str, Any]) -> list[dict[str, Any]]:
        listing: list[dict[str, Any]] = filesystem.ls(folder["name"], detail=True)
        # An object store may list the folder itself, and a page may link to anywhere.
        return [
            each
            for each in listing
            if each["name"].startswith(below) and each["name"].rstrip("/") != folder["name"].rstrip("/")
        ]

    top: dict[str, Any] = {"name": root, "type": "directory"}
    every = _walk(top, entries, lambda entry: entry["type"] == "directory", budget)
    return {entry["name"]: entry.get("size") for entry in every if entry["type"] != "directory"}


def _is_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _filesystem(address: str, budget: Budget) -> tuple[Any, str]:
    """What reads an address, and the path there."""
    import fsspec

    if _is_http(address):
        from xloom.adapters.http_folder import HttpFolder

        return HttpFolder(address, budget), address
    found: tuple[Any, str] = fsspec.core.url_to_fs(address)
    return found


# The Hugging Face hub.


def fetch_hub(address: str, into: Path, budget: Budget) -> None:
    """Copy a hub repository or a folder of it; offline, from the hub's local cache.

    `org/name`, `org/name@revision`, `hf://org/name/folder`, `hf://org/name/folder@revision`.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise XloomError(
            "source_unsupported", f"Reading {address!r} needs huggingface_hub.", "pip install huggingface_hub"
        ) from None

    path, _, revision = address.removeprefix("hf://").partition("@")
    parts = path.strip("/").split("/")
    if ".." in parts or "." in parts or "" in parts:
        raise _unsafe_path(address, path)
    name, folder = "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:])
    wanted: str | None = revision or None
    listed: dict[str, int] | None = None
    missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    try:
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=wanted, files_metadata=True)
            listed = {item.rfilename: item.size or 0 for item in info.siblings or []}
            inside = {file.removeprefix(folder): size for file, size in listed.items() if file.startswith(folder)}
            select(inside, address, budget.limits)
            wanted = info.sha
        except (XloomError, *missing):
            raise
        except Exception:  # offline, or the hub is down: the local cache may have it
            logger.info("the hub did not list %s: its local cache is tried", name, exc_info=True)
        patterns = [f"{folder}*{suffix}" for suffix in ALLOWED_SUFFIXES]
        with budget.silent():
            found = huggingface_hub.snapshot_download(
                name, revision=wanted, allow_patterns=patterns, local_files_only=listed is None
            )  # what was not listed was not measured either
            snapshot = Path(found)
        if not (snapshot / folder).is_dir():
            raise _not_found(address, f"the repository has no folder {folder!r}")
        _copy_below(snapshot / folder, address, into, budget)
    except (XloomError, errors.GatedRepoError) as error:  # a gated repository counts as missing upstream
        raise error if isinstance(error, XloomError) else _unreachable(address, error) from None
    except missing:
        raise _not_found(address, "the hub has no such repository or revision, or the token may not read it") from None
    except Exception as error:  # the hub's, the HTTP client's and the disk's
        raise _unreachable(address, error) from None


register("file", fetch_folder)
register("hf", fetch_hub)


def _not_found(source: str, why: str) -> XloomError:
    return XloomError("source_not_found", f"The source {source!r} can't be read: {why}.", _CHECK_SOURCE, 404)


def _unreachable(source: str, error: BaseException) -> XloomError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return XloomError(
        "source_unreachable",
        f"The source {source!r} could not be read: {type(error).__name__}: {reason}".rstrip(": "),
        "Check the network, the credentials and the permissions, then try again.",
        502,
    )


def _unsafe_path(source: str, name: str) -> XloomError:
    return XloomError(
        "unsafe_path",
        f"The path {name!r} of {source!r} leads out of the source's folder.",
        "Copy the folder with its links resolved (cp -rL) and name the copy.",
    )
