"""Who may call which route: ASGI middleware over the API key and the admin key."""

from __future__ import annotations

import hmac

from xloom.protocol import XloomError
from xloom.router.errors import App, Receive, Scope, Send, send_error

ADMIN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
OPEN = frozenset({"/health", "/ready", "/ping", "/version", "/metrics", "/-/healthz"})  # for probes and scrapers


def is_open(path: str) -> bool:
    """Whether a route is one for probes and scrapers."""
    return "/" + path.strip("/") in OPEN


def refusal(path: str, authorization: str, api_key: str | None, admin_key: str | None) -> XloomError | None:
    """Why a call may not pass, or None. The admin key opens every route."""
    if is_open(path):
        return None
    path = "/" + path.strip("/")
    scheme, _, given = authorization.partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else ""
    is_admin, is_user = _same(given, admin_key), _same(given, api_key)
    if path in ADMIN and admin_key is not None:
        if is_admin:
            return None
        if is_user:
            cure = "Send it as `Authorization: Bearer KEY`."
            return XloomError("admin_key_required", "This route needs the admin key.", cure, 403)
        return _unknown(given)
    if api_key is None or is_user or is_admin:
        return None
    return _unknown(given)


def _same(given: str, wanted: str | None) -> bool:
    return wanted is not None and hmac.compare_digest(given.encode(), wanted.encode())


def _unknown(given: str) -> XloomError:
    what = "The key is not valid." if given else "A key is needed."
    return XloomError("invalid_api_key", what, "Send it as `Authorization: Bearer KEY`.", 401)


class Guard:
    """ASGI middleware that answers what `refusal` refuses."""

    def __init__(self, app: App, api_key: str | None, admin_key: str | None) -> None:
        self._app, self._api_key, self._admin_key = app, api_key, admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS":
            headers = dict(scope["headers"])
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            # Anthropic's clients send their key so.
            if not authorization and (key := headers.get(b"x-api-key")):
                authorization = f"Bearer {key.decode('latin-1')}"
            error = refusal(scope["path"], authorization, self._api_key, self._admin_key)
            if error is not None:
                await send_error(send, error)
                return
        elif scope["type"] == "websocket":
            raise RuntimeError("no route takes websockets")
        await self._app(scope, receive, send)
