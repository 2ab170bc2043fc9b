"""A server that keeps Grafana's documented HTTP API contract, as far as publishing uses it, over real HTTP.

From Grafana's HTTP API reference (dashboard, dashboard versions, folder, data source, other): who may do what, which
status each mistake has, and what is checked before a board is saved.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]
TOKENS = {"glsa_admin": "Admin", "glsa_editor": "Editor", "glsa_viewer": "Viewer"}
ROLES = ("Viewer", "Editor", "Admin")
_UID = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass
class Stored:
    """A board and its history."""

    board: Json
    folder: str
    history: list[Json] = field(default_factory=list)
    provisioned: bool = False


@dataclass
class GrafanaServer:
    """Its state, and how it can be told to behave."""

    url: str = ""
    version: str = "12.1.0"
    data_sources: list[Json] = field(
        default_factory=lambda: [
            {"id": 1, "uid": "loki-uid", "name": "Logs", "type": "loki"},
            {"id": 2, "uid": "prom-uid", "name": "Metrics", "type": "prometheus"},
        ]
    )
    folders: dict[str, str] = field(default_factory=dict)  # uid -> title
    boards: dict[str, Stored] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)  # what was saved, in order
    seen: list[tuple[str, str]] = field(default_factory=list)  # method and path of each request
    pages: bool = True  # history in a page, as since Grafana 11; else a plain list
    adds: Json = field(default_factory=dict)  # what it adds to each board it stores
    before_save: Callable[[], None] | None = None  # what happens between a look and a save
    moved: str = ""  # where it sends all requests on to
    prefix: str = ""  # the path it is served below

    def edit(self, uid: str, author: str = "ada", message: str = "", **fields: Any) -> None:
        """Somebody changes a board in the browser."""
        stored = self.boards[uid]
        stored.board = {**stored.board, **fields}
        self._save(stored, author, message)

    # What each route answers: a status and a body.

    def answer(self, method: str, path: str, query: dict[str, list[str]], token: str | None, body: Any) -> Any:
        """One request."""
        self.seen.append((method, path))
        if path == "/api/health":
            return 200, {"database": "ok", "version": self.version, "commit": "abc"}
        role = TOKENS.get(token or "")
        if role is None:
            message = "Invalid API key" if token else "Unauthorized"
            return 401, {"message": message, "messageId": "api-key.invalid", "statusCode": 401, "traceID": ""}
        needed = {"/api/datasources": "Admin"}.get(path, "Viewer" if method == "GET" else "Editor")
        if path.endswith("/versions"):
            needed = "Editor"
        if ROLES.index(role) < ROLES.index(needed):
            return 403, {
                "title": "Access denied",
                "message": "You'll need additional permissions to perform this action.",
            }
        if (method, path) == ("GET", "/api/datasources"):
            return 200, self.data_sources
        if (method, path) == ("GET", "/api/folders"):
            limit = int(query.get("limit", ["1000"])[0])
            return 200, [self._folder(uid) for uid in list(self.folders)[:limit]]
        if (method, path) == ("POST", "/api/folders"):
            return self._make_folder(body)
        if (method, path) == ("POST", "/api/dashboards/db"):
            return self._post_board(body)
        if method == "GET" and (found := re.fullmatch(r"/api/dashboards/uid/([^/]+)(/versions)?", path)):
            return self._get_board(unquote(found[1]), bool(found[2]), int(query.get("limit", ["0"])[0]))
        return 404, {"message": "Not found"}

    def _folder(self, uid: str) -> Json:
        number = list(self.folders).index(uid) + 1
        return {"id": number, "uid": uid, "title": self.folders[uid]}

    def _make_folder(self, body: Any) -> Any:
        if not isinstance(body, dict) or not body.get("title"):
            return 400, {"message": "folder title cannot be empty"}
        uid = body.get("uid") or f"folder-{len(self.folders) + 1}"
        if not _UID.fullmatch(uid):
            return 400, {"message": "uid contains illegal characters"}
        if uid in self.folders or body["title"] in self.folders.values():
            return 409, {"message": "a folder with the same name already exists in the current location"}
        self.folders[uid] = body["title"]
        self.writes.append(f"folder {body['title']}")
        return 200, {**self._folder(uid), "url": f"/dashboards/f/{uid}/", "version": 1}

    def _get_board(self, uid: str, history: bool, limit: int) -> Any:
        stored = self.boards.get(uid)
        if stored is None:
            return 404, {"message": "Dashboard not found"}
        if history:
            newest = stored.history[::-1][: limit or None]
            return 200, {"continueToken": "", "versions": newest} if self.pages else newest
        meta = {
            "canSave": True,
            "folderUid": stored.folder,
            "provisioned": stored.provisioned,
            "updatedBy": stored.history[-1]["createdBy"],
            "url": f"{self.prefix}/d/{uid}/slug",
            "version": stored.board["version"],
        }
        return 200, {"meta": meta, "dashboard": stored.board}

    def _post_board(self, body: Any) -> Any:
        if self.before_save is not None:
            self.before_save()
        if not isinstance(body, dict) or not isinstance(body.get("dashboard"), dict):
            return 400, {"message": "bad request data"}
        board, folder, overwrite = body["dashboard"], body.get("folderUid") or "", bool(body.get("overwrite"))
        if not board.get("title"):
            return 400, {"message": "Dashboard title cannot be empty", "status": "empty-name"}
        if not _UID.fullmatch(board.get("uid") or ""):
            return 400, {"message": "uid contains illegal characters"}
        if folder and folder not in self.folders:
            return 400, {"message": "folder not found", "status": "not-found"}
        stored = self.boards.get(board["uid"])
        if stored is None and board.get("id"):
            return 404, {"message": "Dashboard not found", "status": "not-found"}
        if stored is not None and stored.provisioned:
            return 400, {"message": "Cannot save provisioned dashboard"}
        if stored is not None and not overwrite and board.get("version") != stored.board["version"]:
            return 412, {"message": "The dashboard has been changed by someone else", "status": "version-mismatch"}
        for other in self.boards.values():
            if other is not stored and (other.board["title"], other.folder) == (board["title"], folder):
                message = "A dashboard with the same name in the folder already exists"
                return 412, {"message": message, "status": "name-exists"}
        if stored is None:
            stored = self.boards[board["uid"]] = Stored({"id": len(self.boards) + 1, "version": 0}, folder)
        kept = {"id": stored.board["id"], "version": stored.board["version"]}
        stored.board, stored.folder = {**copy.deepcopy(board), **self.adds, **kept}, folder
        self._save(stored, "xloom", body.get("message", ""))
        self.writes.append(f"board {board['uid']}")
        return 200, {
            "id": stored.board["id"],
            "uid": board["uid"],
            "url": f"{self.prefix}/d/{board['uid']}/slug",
            "status": "success",
            "version": stored.board["version"],
        }

    @staticmethod
    def _save(stored: Stored, author: str, message: str) -> None:
        stored.board["version"] += 1
        stored.history.append({"version": stored.board["version"], "createdBy": author, "message": message})


@contextmanager
def grafana_server(state: GrafanaServer) -> Iterator[GrafanaServer]:
    """The server, on a free port of loopback, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet: two cost 40 ms

        def do_GET(self) -> None:
            self._respond()

        def do_POST(self) -> None:
            self._respond()

        def _respond(self) -> None:
            parts = urlsplit(self.path)
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                body = json.loads(data) if data else None
            except ValueError:
                body = None
            known = token if scheme == "Bearer" else None
            if state.moved:
                status, answer = 301, {}
            elif not parts.path.startswith(f"{state.prefix}/api/"):
                status, answer = 404, {"message": "Not found"}
            else:
                path = parts.path.removeprefix(state.prefix)
                status, answer = state.answer(self.command, path, parse_qs(parts.query), known, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            if state.moved:
                self.send_header("Location", state.moved)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
