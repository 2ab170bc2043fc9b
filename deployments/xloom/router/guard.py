"""Who may call which route: ASGI middleware over the API key and the admin key."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from xloom.protocol import XloomError
from xloom.router.errors import App, Receive, Scope, Send, send_error
from xloom.router.routes import Access


def refusal(wanted: Access, authorization: str, api_key: str | None, admin_key: str | None) -> XloomError | None:
    """Why a call of a route may not pass, or None. The admin key opens every route."""
    if wanted is Access.OPEN:
        return None
    scheme, _, given = authorization.partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else ""
    is_admin, is_user = _same(given, admin_key), _same(given, api_key)
    if wanted is Access.ADMIN and admin_key is not None:
        if is_admin:
            return None
        if is_user:
            cure = "Send it as `Authorization: Bearer KEY`."
            return XloomError("admin_key_required", "This route needs the admin key.", cure, 403)
        return _unknown(given, "The admin key")
    if api_key is None or is_user or is_admin:
        return None
    return _unknown(given, "An API key")


def _same(given: str, wanted: str | None) -> bool:
    return wanted is not None and hmac.compare_digest(given.encode(), wanted.encode())


def _unknown(given: str, wanted: str) -> XloomError:
    what = "The key is not valid." if given else f"{wanted} is needed."
    return XloomError("invalid_api_key", what, "Send it as `Authorization: Bearer KEY`.", 401)


class Guard:
    """ASGI middleware that answers what `refusal` refuses.

    `access` says what the route that will take a request asks for; nothing within may change a request's path.
    """

    def __init__(self, app: App, access: Callable[[Scope], Access], api_key: str | None, admin_key: str | None) -> None:
        self._app, self._access, self._api_key, self._admin_key = app, access, api_key, admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # no route takes them
            return
        if scope["type"] == "http" and scope["method"] != "OPTIONS":
            headers = dict(scope["headers"])
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            # Anthropic's clients send their key so.
            if not authorization and (key := headers.get(b"x-api-key")):
                authorization = f"Bearer {key.decode('latin-1')}"
            error = refusal(self._access(scope), authorization, self._api_key, self._admin_key)
            if error is not None:
                await send_error(send, error)
                return
        await self._app(scope, receive, send)
