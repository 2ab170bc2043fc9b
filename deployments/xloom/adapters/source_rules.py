"""Which sources adapters may be taken from: an allow-list of prefixes, compared part by part."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from xloom.adapters.limits import Limits
from xloom.protocol import XloomError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")  # org/name, or org/name@revision
_LOCAL = "file"
_SHOWN = 20  # prefixes in a message


@dataclass(frozen=True)
class Place:
    """Where a source is: scheme, authority (host or bucket), and the parts of its path."""

    scheme: str
    authority: str
    parts: tuple[str, ...]

    def holds(self, other: Place) -> bool:
        """Whether another place is this one, or below it."""
        return (
            self.scheme == other.scheme
            and (not self.authority or self.authority == other.authority)
            and self.parts == other.parts[: len(self.parts)]
        )


def is_local(source: str) -> bool:
    """Whether a source is a folder of this machine."""
    return source.startswith(("/", ".", "~", "file://"))


def local_path(source: str) -> Path:
    """The folder a local source names. Raises `XloomError` (source_not_found) unless it is absolute."""
    path = Path(source.removeprefix("file://"))
    try:
        path = path.expanduser()
    except RuntimeError:  # a user that is not there
        raise _not_found(source, "there is no such user") from None
    if not path.is_absolute():
        raise _not_found(source, "a local folder is named by its absolute path")
    return path


def place(source: str) -> Place:
    """Where a source is, links of this machine resolved. Raises `XloomError`: source_not_found, unsafe_path."""
    if not source.strip() or "\0" in source:
        raise _not_found(source, "it names nothing")
    if is_local(source):
        try:
            return Place(_LOCAL, "", local_path(source).resolve().parts)
        except (OSError, RuntimeError) as error:  # links that go round, a name too long
            raise _not_found(source, str(error)) from None
    scheme, separator, _ = source.partition("://")
    if not separator:
        if HUB_ID.fullmatch(source) is None:
            raise _not_found(source, "it is neither a folder (/… or ./…), a hub id (org/name) nor a URL")
        return place(f"hf://{source}")
    # fsspec's local:// is a path by another name.
    if "::" in source or scheme == "local" or re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) is None:
        raise XloomError("source_unsupported", f"URLs such as {source!r} are not read.", "Write one plain URL.")
    url = urlsplit(source)
    path = url.netloc + url.path if scheme == "hf" else url.path
    strange = "\\" in source or "%" in path or url.query or url.fragment
    if strange or any(part in (".", "..") for part in path.split("/")):
        raise XloomError(
            "unsafe_path",
            f"The source {source!r} has a part that can lead elsewhere.",
            "Write the URL plainly: without .., %, ? and #.",
        )
    if scheme == "hf":
        path = path.partition("@")[0]  # a revision is no part of where it is, and may have a / in it
    parts = tuple(part for part in path.split("/") if part)
    return Place(scheme, "" if scheme == "hf" else url.netloc, parts)


@dataclass(frozen=True)
class SourceRules:
    """What may be taken in, and how much of it at once."""

    allowed: tuple[str, ...] | None = None  # prefixes; None: any, for what the operator's own settings name
    limits: Limits = field(default_factory=Limits)

    def check(self, source: str) -> None:
        """Raise `XloomError`: source_not_allowed, and as `place`."""
        self._matching(source)

    def trusts_host(self, source: str) -> bool:
        """Whether the source's own host was named, so that it may be one of the inner network."""
        return self.allowed is None or any(prefix.authority for prefix in self._matching(source))

    def _matching(self, source: str) -> list[Place]:
        wanted = place(source)
        if self.allowed is None:
            return []
        matching = [prefix for prefix in map(place, self.allowed) if prefix.holds(wanted)]
        if not matching:
            raise XloomError(
                "source_not_allowed",
                f"This deployment does not take adapters from {source!r}.",
                f"Name one under {_listed(self.allowed)}, or add {_near(wanted)!r} to store.sources and start again.",
                403,
            )
        return matching


def check_prefixes(prefixes: Iterable[str]) -> None:
    """Raise `XloomError` (invalid_settings) for a prefix of `store.sources` under which nothing could lie."""
    for prefix in prefixes:
        try:
            patterns = [part for part in place(prefix).parts if "*" in part]
        except XloomError as error:
            raise XloomError("invalid_settings", f"store.sources: {error.message}", error.cure) from None
        if patterns:
            what = f"store.sources: {prefix!r} is read as it stands, not as a pattern."
            raise XloomError("invalid_settings", what, "Leave the * out: all below a prefix may be added.")


def beside(source: str, path: str) -> str | None:
    """The address of `path`, relative to the folder that holds a source; None where nothing lies beside it."""
    if is_local(source):
        return str(local_path(source).resolve().parent / path)
    if "://" in source and not source.startswith("hf://"):
        return posixpath.join(source.rstrip("/").rpartition("/")[0], path)
    return None  # a hub repository has nothing beside it


def _near(wanted: Place) -> str:
    """The prefix under which all that lies beside a place may be added."""
    if wanted.scheme == _LOCAL:
        folder = Path(*wanted.parts)
        return str(folder.parent if len(wanted.parts) > 2 else folder)
    parts = wanted.parts[:-1] or wanted.parts
    return f"{wanted.scheme}://{'/'.join(filter(None, (wanted.authority, *parts)))}"


def _listed(prefixes: Iterable[str]) -> str:
    names = sorted(set(prefixes))
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "") or "nothing"


def _not_found(source: str, why: str) -> XloomError:
    cure = "Check the source's path or URL."
    return XloomError("source_not_found", f"The source {source!r} can't be read: {why}.", cure, 404)
