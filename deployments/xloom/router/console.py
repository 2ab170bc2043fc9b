"""The page at `/console`: the static files of `xloom/console`, a route for each of a fixed table.

The files hold no secret and are open to all; what the page shows it asks of the API, with the key its user types in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from fastapi import FastAPI, Request, Response

FOLDER = Path(__file__).parents[1] / "console"
PAGE = "/console"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PARTS = (
    "alignment.js",
    "answer.js",
    "api.js",
    "chat.js",
    "console.css",
    "deployment.js",
    "element.js",
    "events.js",
    "gates.css",
    "gates.js",
    "icon.svg",
    "key.js",
    "main.js",
    "message.js",
    "mixture_view.js",
    "models.js",
    "palette.js",
    "readout.js",
    "strip.js",
    "tokens.js",
    "weights.js",
)
FILES: Mapping[str, str] = MappingProxyType({PAGE: "index.html"} | {f"{PAGE}/{name}": name for name in _PARTS})
# What it refers to is relative to /console, as it has to be behind a proxy that adds a prefix.
MOVED = f"{PAGE}/"

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes markup, by whatever mistake
        "trusted-types 'none'",
    )
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",  # asked for anew each time, and not sent anew while the ETag holds
    }
)


def attach_console(app: FastAPI) -> None:
    """Add the page to an application. The files are read once."""
    for path, name in FILES.items():
        handler = _handler((FOLDER / name).read_bytes(), _TYPES[Path(name).suffix])
        app.add_api_route(path, handler, methods=["GET", "HEAD"], response_model=None)
    app.add_api_route(MOVED, _moved, methods=["GET", "HEAD"], response_model=None)


def _handler(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": tag}

    async def file(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if known.strip() == "*" or tag in (each.strip().removeprefix("W/") for each in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return file


async def _moved() -> Response:
    return Response(status_code=308, headers={**HEADERS, "location": f"..{PAGE}"})
