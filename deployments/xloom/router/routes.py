"""The routes an endpoint has, and who may call each: what is not listed here is not served.

vLLM 0.32 adds routes by environment variables, plugins and options, and SageMaker's package replaces some of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

from starlette.routing import BaseRoute, Match

from xloom.router.console import FILES, MOVED
from xloom.router.errors import Scope


class Access(Enum):
    """Which key opens a route; the admin key opens all."""

    OPEN = "open"  # for probes and scrapers, and the page's own files
    USER = "user"
    ADMIN = "admin"


_OURS: dict[str, Access] = {
    "/ready": Access.OPEN,
    "/-/healthz": Access.OPEN,
    "/xloom/status": Access.USER,
    "/xloom/adapters": Access.USER,
    "/v1/load_lora_adapter": Access.ADMIN,
    "/v1/unload_lora_adapter": Access.ADMIN,
    "/xloom/mixtures": Access.ADMIN,
    **dict.fromkeys((*FILES, MOVED), Access.OPEN),  # the page's own files; what it shows it asks of the others
}
_PROBES = ("/health", "/ping", "/version", "/metrics")
_FRONT_ENDS: dict[str, Access] = dict.fromkeys(_PROBES, Access.OPEN) | dict.fromkeys(
    (
        "/load",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/invocations",
        "/inference/v1/generate",
        "/generative_scoring",
        "/v1/models",
        "/v1/completions",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/messages/render",
        "/v1/responses",
        "/v1/responses/render",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/systemone",
    ),
    Access.USER,
)
ROUTES: Mapping[str, Access] = MappingProxyType(_OURS | _FRONT_ENDS)


def is_open(path: str) -> bool:
    """Whether a path is open, as a probe's or scraper's: for logs and counts. A request is authorised by its route."""
    return ROUTES.get("/" + path.strip("/")) is Access.OPEN


def keep_listed(app: Any) -> None:
    """Take every route off a FastAPI app that is not listed, and others' handlers of routes that are ours."""
    app.router.routes[:] = [route for route in app.router.routes if _is_listed(route)]


def _is_listed(route: BaseRoute) -> bool:
    path = getattr(route, "path", None)
    endpoint = getattr(route, "endpoint", None)
    if path in _OURS:
        return getattr(endpoint, "__module__", "").startswith("xloom.")
    return path in _FRONT_ENDS


def access(app: Any, scope: Scope) -> Access:
    """What the route of a FastAPI app that will take a request asks for, found as `starlette.routing.Router.app` will.

    One whose method does not fit counts as well: it answers 405. No route: a key is asked for before a 404.
    """
    if app.root_path:
        scope = {**scope, "root_path": app.root_path}  # as `FastAPI.__call__` does
    partial: BaseRoute | None = None
    for route in app.router.routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return ROUTES.get(route.path, Access.ADMIN)
        if match is Match.PARTIAL and partial is None:
            partial = route
    return Access.USER if partial is None else ROUTES.get(getattr(partial, "path", ""), Access.ADMIN)
