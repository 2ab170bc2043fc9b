"""Who may call which route: ASGI middleware over the API key and the admin key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from xloom.observability.logs import hide
from xloom.protocol import XloomError
from xloom.router.errors import App, Receive, Scope, Send, send_error
from xloom.router.exposure import is_loopback
from xloom.router.keys import KeyDigest, Keys
from xloom.router.routes import Access


def refusal(wanted: Access, authorization: str, keys: Keys, *, local: bool) -> XloomError | None:
    """Why a call of a route may not pass, or None. The admin key opens every route.

    Without an admin key nobody may change adapters, but where there are no keys at all and the call is one of this
    machine's own users (`local`).
    """
    if wanted is Access.OPEN:
        return None
    scheme, _, given = authorization.partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else ""
    is_admin, is_user = _same(given, keys.admin), _same(given, keys.api)
    if wanted is Access.ADMIN:
        if is_admin or (local and keys == Keys()):
            return None
        if keys.admin is None and (is_user or keys.api is None):
            cure = "Set XLOOM_ADMIN_KEY (or router.admin_key) and start again."
            what = "This deployment has no admin key, so adapters can't be changed."
            return XloomError("admin_key_required", what, cure, 403)
        if is_user:
            cure = "Send it as `Authorization: Bearer KEY`."
            return XloomError("admin_key_required", "This route needs the admin key.", cure, 403)
        return _unknown(given, "The admin key")
    if keys.api is None or is_user or is_admin:
        return None
    return _unknown(given, "An API key")


def _same(given: str, wanted: KeyDigest | None) -> bool:
    if wanted is None or not given or not wanted.matches(given):
        return False
    hide(given)  # only a client can have brought a key here
    return True


def _unknown(given: str, wanted: str) -> XloomError:
    what = "The key is not valid." if given else f"{wanted} is needed."
    return XloomError("invalid_api_key", what, "Send it as `Authorization: Bearer KEY`.", 401)


def _is_of_a_page(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a web page may have sent a request from this machine's browser: as one of another origin, or by a name
    of its own that it had lead here.
    """
    host = headers.get(b"host", b"").decode("latin-1")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return True
    origin = headers.get(b"origin", b"").decode("latin-1")
    return not is_loopback(name) or (origin != "" and origin.partition("://")[2] != host)


class Guard:
    """ASGI middleware that answers what `refusal` refuses. `local`: only this machine's own users reach the endpoint.

    `access` says what the route that will take a request asks for; nothing within may change a request's path.
    """

    def __init__(self, app: App, access: Callable[[Scope], Access], keys: Keys, *, local: bool) -> None:
        self._app, self._access, self._keys, self._local = app, access, keys, local

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
            local = self._local and not _is_of_a_page(headers)
            error = refusal(self._access(scope), authorization, self._keys, local=local)
            if error is not None:
                await send_error(send, error)
                return
        await self._app(scope, receive, send)
