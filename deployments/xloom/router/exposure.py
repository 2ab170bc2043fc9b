"""Who can reach the endpoint, and whether the keys suit that: checked before anything starts."""

from __future__ import annotations

import ipaddress

from xloom.protocol import XloomError
from xloom.settings import RouterSettings


def is_loopback(host: str) -> bool:
    """Whether an address is reached from its own machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: wherever it may lead
        return False


def check_exposure(router: RouterSettings) -> None:
    """Raise `XloomError`: endpoint_without_keys, one_key_for_both."""
    if router.api_key is None and not router.allow_anonymous and not is_loopback(router.host):
        raise XloomError(
            "endpoint_without_keys",
            f"The endpoint would listen at {router.host} without an API key, open to whoever reaches it.",
            "Set XLOOM_API_KEY (or router.api_key), or router.host: 127.0.0.1; router.allow_anonymous leaves it open.",
        )
    if router.api_key is not None and router.api_key == router.admin_key:
        raise XloomError(
            "one_key_for_both",
            "The API key and the admin key are the same, so every client could add and remove adapters.",
            "Give router.admin_key (or XLOOM_ADMIN_KEY) another value, or leave it out: then nobody may.",
        )
