"""Grafana's HTTP API as far as publishing needs it: grafana-api's calls, and our errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from grafana_api.grafana_api import GrafanaException
from grafana_api.grafana_face import GrafanaFace

from xloom.protocol import XloomError

TIMEOUT_S = 30.0
PROMETHEUS = ("prometheus", "grafana-amazonprometheus-datasource", "grafana-azureprometheus-datasource")
TOP = ("", "General", "Dashboards")  # what people call the place of boards in no folder
_CONFLICTS = {  # what a refused board's `status` says
    "version-mismatch": "somebody saved it in Grafana while it was being published",
    "name-exists": "another board of this title is in the folder",
}


@dataclass(frozen=True)
class DataSource:
    """A Prometheus that Grafana knows."""

    name: str
    uid: str


@dataclass(frozen=True)
class Published:
    """A board as Grafana has it."""

    board: dict[str, Any]
    version: int
    folder: str  # its uid; empty: none
    provisioned: bool  # from files, so that only they can change it
    message: str | None  # of its newest version; None where the token may not see the history
    author: str  # of its newest version


class Conflict(Exception):
    """Grafana refuses a board: somebody saved it meanwhile, or its title is taken."""


class Grafana:
    """One Grafana and a token for it. Every failure is an `XloomError`, and none shows the token."""

    def __init__(self, url: str, token: str) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        _check(self.url, token)
        parts = urlsplit(self.url)
        prefix = parts.path.strip("/")
        self._face = GrafanaFace(
            auth=token,
            host=parts.netloc,
            url_path_prefix=f"{prefix}/" if prefix else "",
            protocol=parts.scheme,
            timeout=TIMEOUT_S,
        )
        self._origin = f"{parts.scheme}://{parts.netloc}"
        # `GrafanaAPI.s` (grafana-api 1.0.3) is its requests session. A POST that is sent on becomes a GET.
        self._face.api.s.max_redirects = 0

    def __enter__(self) -> Grafana:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._face.api.s.close()

    def check(self) -> str:
        """Grafana's version. Raises `XloomError`: nobody answers, or somebody else."""
        try:
            health = self._call("its health", lambda: self._face.api.GET("/health"))
        except GrafanaException as error:
            raise self._stranger(f"status {error.status_code}") from None
        if not isinstance(health, dict) or "database" not in health:
            raise self._stranger("no health of its database")
        return str(health.get("version", ""))

    def data_sources(self) -> list[DataSource] | None:
        """The Prometheus data sources; None where the token may not look at them."""
        try:
            found = self._call("data sources", self._face.datasource.list_datasources)
        except GrafanaException as error:
            if error.status_code == HTTPStatus.FORBIDDEN:
                return None
            raise _refusal(error, "data sources") from None
        return [DataSource(each["name"], each["uid"]) for each in found if each.get("type") in PROMETHEUS]

    def folder(self, title: str) -> str | None:
        """The uid of a folder by its title or uid; empty for the top, None where there is none."""
        if title in TOP:
            return ""
        folders = self._good("folders", self._face.folder.get_all_folders)
        for key in ("title", "uid"):
            for each in folders:
                if each.get(key) == title:
                    return str(each["uid"])
        return None

    def make_folder(self, title: str) -> str:
        """A new folder's uid."""
        return str(self._good(f"the folder {title!r}", lambda: self._face.folder.create_folder(title))["uid"])

    def board(self, uid: str) -> Published | None:
        """A board by its uid; None where there is none."""
        try:
            answer = self._call(f"the board {uid}", lambda: self._face.dashboard.get_dashboard(uid))
        except GrafanaException as error:
            if error.status_code == HTTPStatus.NOT_FOUND:
                return None
            raise _refusal(error, f"the board {uid}") from None
        board, meta, newest = answer["dashboard"], answer.get("meta", {}), self._newest(uid)
        return Published(
            board=board,
            version=int(board.get("version") or 0),
            folder=str(meta.get("folderUid") or ""),
            provisioned=bool(meta.get("provisioned")),
            message=None if newest is None else str(newest.get("message") or ""),
            author=str((newest or {}).get("createdBy") or meta.get("updatedBy") or ""),
        )

    def save(self, board: dict[str, Any], folder: str, message: str, *, overwrite: bool) -> str:
        """Create or update a board, whose `version` must be the one Grafana has. Its URL. Raises `Conflict`."""
        body = {"dashboard": board, "message": message, "overwrite": overwrite}
        if folder:
            body["folderUid"] = folder
        what = f"the board {board['title']!r}"
        try:
            saved = self._call(what, lambda: self._face.dashboard.update_dashboard(body))
        except GrafanaException as error:
            if error.status_code not in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT):
                raise _refusal(error, what) from None
            status = error.response.get("status") if isinstance(error.response, dict) else None
            raise Conflict(_CONFLICTS.get(str(status), f"Grafana says: {_said(error)}")) from None
        return f"{self._origin}{saved.get('url', '')}"  # which has Grafana's own path in front

    def _newest(self, uid: str) -> dict[str, Any] | None:
        """The newest entry of a board's history: a list, or since Grafana 11 a page of one. None: not to be seen."""
        path = f"/dashboards/uid/{quote(uid, safe='')}/versions?limit=1"
        try:
            answer = self._call("versions", lambda: self._face.api.GET(path))
        except GrafanaException:
            return None
        entries: list[dict[str, Any]] = answer.get("versions", []) if isinstance(answer, dict) else answer
        return max(entries, key=lambda entry: int(entry.get("version", 0)), default=None)

    def _good(self, what: str, ask: Callable[[], Any]) -> Any:
        """An answer. Raises `XloomError`, also when Grafana refuses."""
        try:
            return self._call(what, ask)
        except GrafanaException as error:
            raise _refusal(error, what) from None

    def _call(self, what: str, ask: Callable[[], Any]) -> Any:
        """An answer; `GrafanaException` says that Grafana refuses. Raises `XloomError` where it is not to be had."""
        try:
            return ask()
        except requests.TooManyRedirects as error:
            there = error.response.headers.get("Location", "") if error.response is not None else ""
            raise self._stranger(f"it sends on to {there}") from None
        except requests.JSONDecodeError:
            raise self._stranger(f"no JSON for {what}") from None
        except requests.RequestException as error:
            raise XloomError(
                "grafana_unreachable",
                f"No answer from {self.url}: {error}.",
                "Is Grafana up, and is --url the one to reach it from here?",
                503,
            ) from None

    def _stranger(self, why: str) -> XloomError:
        return XloomError(
            "not_a_grafana",
            f"{self.url} does not answer as Grafana does: {why}.",
            "Give the URL that a browser shows, without /dashboards and what follows.",
            502,
        )


def _said(error: GrafanaException) -> str:
    """Grafana's own words."""
    return str(error.response.get("message", "")) if isinstance(error.response, dict) else str(error.response)[:200]


def _refusal(error: GrafanaException, what: str) -> XloomError:
    if error.status_code == HTTPStatus.UNAUTHORIZED:
        return XloomError(
            "grafana_unauthorized",
            f"Grafana does not take the token: {_said(error)}.",
            "Make a service account with the role Editor (Administration, Users and access), and give its token with "
            "--token-file or XLOOM_GRAFANA_TOKEN.",
            401,
        )
    if error.status_code == HTTPStatus.FORBIDDEN:
        return XloomError(
            "grafana_forbidden",
            f"The token's role does not allow {what}: {_said(error)}",
            "Give its service account the role Editor, or leave to write in that folder.",
            403,
        )
    return XloomError(
        "grafana_error",
        f"Grafana answered {error.status_code} for {what}: {_said(error)}.",
        "See Grafana's own log.",
        502,
    )


def _check(url: str, token: str) -> None:
    """Refuse here what requests would refuse with the secret in its message."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        name = parts.hostname or "It"
        raise XloomError("invalid_url", f"{name} is not Grafana's URL.", "Give http://host:port, without a password.")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise XloomError(
            "invalid_grafana_token",
            "The token is empty, or has characters that no token has.",
            "Give a service account's token, as Grafana showed it, with --token-file or XLOOM_GRAFANA_TOKEN.",
        )
