"""Where adapters come from: a local folder, the Hugging Face hub, or any fsspec URL. Pickle is never copied."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from xloom.protocol import XloomError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

ALLOWED_SUFFIXES = (".json", ".safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
WEIGHT_STEMS = ("adapter_model", "xlora_classifier", "pytorch_model")

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")  # org/name, or org/name@revision
_CHECK_SOURCE = "Check the source's path or URL."


@dataclass(frozen=True)
class Limits:
    """The most one source may bring in."""

    files: int = 2000
    size: int = 32 * 2**30  # bytes
    depth: int = 16  # folders within folders
    seen: int = 100_000  # files of any kind that are looked at


class Source(Protocol):
    """Copies what a source's address names into an empty folder. Raises `XloomError`."""

    def __call__(self, address: str, into: Path, limits: Limits) -> None: ...


_SCHEMES: dict[str, Source] = {}


def register(scheme: str, source: Source) -> None:
    """Serve `scheme://` addresses by this function instead of fsspec's."""
    _SCHEMES[scheme] = source


def fetch(source: str, into: Path, limits: Limits | None = None) -> None:
    """Copy a source's JSON and safetensors files into `into`, sub-folders kept.

    Raises `XloomError`: source_not_found, source_unreachable, source_unsupported, source_too_large,
    pickle_refused (weights as pickle), unsafe_path (a path or link that leaves the source).
    """
    limits = limits or Limits()
    into.mkdir(parents=True, exist_ok=True)
    scheme, separator, _ = source.partition("://")
    if separator:
        _SCHEMES.get(scheme, fetch_url)(source, into, limits)
    elif is_local(source):
        fetch_folder(source, into, limits)
    elif _HUB_ID.match(source):
        fetch_hub(source, into, limits)
    else:
        raise _not_found(source, "it is neither a folder, a hub id (org/name) nor a URL")


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
        limit = f"the limits are {limits.files} files and {limits.size} bytes"
        raise _too_large(source, f"{len(chosen)} files of {size} bytes; {limit}")
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
    names = ("adapter_config.json", "xlora_config.json")
    if any((fetched / name).is_file() for name in names):
        return fetched
    found = {file.parent for name in names for file in fetched.rglob(name)}
    outermost = sorted(folder for folder in found if not found.intersection(folder.parents))
    if len(outermost) > 1:
        listed = ", ".join(folder.relative_to(fetched).as_posix() for folder in outermost[:5])
        raise _not_found(source, f"it holds {len(outermost)} adapters ({listed}): add the one's folder to the source")
    return outermost[0] if outermost else fetched


# Local folders.


def is_local(source: str) -> bool:
    """Whether a source is a folder of this machine."""
    return source.startswith(("/", ".", "~", "file://")) or ("://" not in source and Path(source).is_dir())


def fetch_folder(address: str, into: Path, limits: Limits) -> None:
    """Copy a local folder (a path or file:// URL).

    Links are followed within it, and into the blobs of the hub cache's repository that it is a snapshot of.
    """
    root = Path(address.removeprefix("file://")).expanduser()
    if not root.is_dir():
        raise _not_found(address, "there is no such folder")
    try:
        root = root.resolve()
        found = _walk(root, address, limits)
        names = select({name: path.stat().st_size for name, path in found.items()}, address, limits)
        for name in names:
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found[name], target)
    except OSError as error:
        raise _unreachable(address, error) from None


def _walk(root: Path, source: str, limits: Limits) -> dict[str, Path]:
    """Each file's relative POSIX path, and where it is when all links are followed."""
    stores = [root, *_blobs(root)]
    files: dict[str, Path] = {}
    waiting: list[tuple[Path, tuple[Path, ...]]] = [(root, (root,))]  # folders, with the real ones that lead to them
    while waiting:
        folder, above = waiting.pop()
        for entry in sorted(folder.iterdir()):
            if folder == root and entry.name.startswith(".."):
                continue  # where Kubernetes keeps what the links beside it lead to (its AtomicWriter, 1.34)
            real, name = entry.resolve(), entry.relative_to(root).as_posix()
            if entry.is_symlink() and not any(real.is_relative_to(store) for store in stores):
                raise _unsafe_path(source, name)
            if real.is_dir():
                if real in above or len(above) > limits.depth:
                    raise _unsafe_path(source, name)
                waiting.append((entry, (*above, real)))
            elif real.is_file():
                files[name] = real
                if len(files) > limits.seen:
                    raise _too_large(source, f"more than {limits.seen} files of any kind")
    return files


def _blobs(root: Path) -> list[Path]:
    """The blobs that a snapshot in the hub's cache is made of links to (huggingface_hub 1), if this is in one."""
    for snapshots in (parent for parent in root.parents if parent.name == "snapshots"):
        repository = snapshots.parent
        blobs = repository / "blobs"
        if repository.name.startswith(("models--", "datasets--")) and blobs.is_dir() and not blobs.is_symlink():
            return [blobs]
    return []


# fsspec URLs.


def fetch_url(address: str, into: Path, limits: Limits) -> None:
    """Copy a folder at any fsspec URL: s3://, gs://, az://, hdfs://, memory://…"""
    import fsspec

    if "::" in address:
        raise XloomError("source_unsupported", f"Chained URLs such as {address!r} are not read.", _CHECK_SOURCE)
    try:
        filesystem, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise XloomError(
            "source_unsupported",
            f"Nothing installed reads {address!r}: {error}",
            "Install it: s3fs for s3://, gcsfs for gs://, adlfs for az://.",
        ) from None
    except ValueError as error:
        raise XloomError("source_unsupported", f"{address!r}: {error}", _CHECK_SOURCE) from None
    try:
        filesystem.invalidate_cache()  # listings are cached for the process's life: a source may have changed
        found: dict[str, dict[str, Any]] = filesystem.find(root, detail=True)
        prefix = root.rstrip("/") + "/"
        sizes = {path.removeprefix(prefix): int(info.get("size") or 0) for path, info in found.items() if path != root}
        if not sizes:
            raise _not_found(address, "there is no such folder, or it is empty")
        names = select(sizes, address, limits)
        for name in names:
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(prefix + name, str(target))
    except XloomError:
        raise
    except FileNotFoundError:
        raise _not_found(address, "there is no such folder") from None
    except Exception as error:  # each filesystem library raises its own kinds
        raise _unreachable(address, error) from None


# The Hugging Face hub.


def fetch_hub(address: str, into: Path, limits: Limits) -> None:
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
    missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    try:
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=wanted, files_metadata=True)
            listed = {item.rfilename: item.size or 0 for item in info.siblings or []}
            select(_under(folder, listed), address, limits)
            wanted = info.sha
        except (XloomError, *missing):
            raise
        except Exception:  # offline, or the hub is down: the local cache may have it
            logger.info("the hub did not list %s: its local cache is tried", name, exc_info=True)
        patterns = [f"{folder}*{suffix}" for suffix in ALLOWED_SUFFIXES]
        snapshot = Path(huggingface_hub.snapshot_download(name, revision=wanted, allow_patterns=patterns))
    except (XloomError, errors.GatedRepoError) as error:  # a gated repository counts as missing upstream
        raise error if isinstance(error, XloomError) else _unreachable(address, error) from None
    except missing:
        raise _not_found(address, "the hub has no such repository or revision, or the token may not read it") from None
    except Exception as error:  # the hub's, the HTTP client's and the disk's
        raise _unreachable(address, error) from None
    # A snapshot is made of links into the repository's blobs, two folders up: these are followed.
    blobs = snapshot.parent.parent.resolve()
    files = _under(
        folder, {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
    )
    chosen = select({key: path.stat().st_size for key, path in files.items()}, address, limits)
    for key in chosen:
        if not files[key].resolve().is_relative_to(blobs):
            raise _unsafe_path(address, key)
        target = into / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[key], target)


def _under(folder: str, files: dict[str, Value]) -> dict[str, Value]:
    return {name.removeprefix(folder): value for name, value in files.items() if name.startswith(folder)}


register("file", fetch_folder)
register("hf", fetch_hub)


def _not_found(source: str, why: str) -> XloomError:
    return XloomError("source_not_found", f"The source {source!r} can't be read: {why}.", _CHECK_SOURCE, 404)


def _too_large(source: str, what: str) -> XloomError:
    cure = "Name the folder of one adapter or bundle alone."
    return XloomError("source_too_large", f"The source {source!r} holds {what}.", cure)


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
