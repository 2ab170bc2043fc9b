"""HTTP connections of a source: none leads to an address of the inner network that nobody named, by redirect either.

Relies on fsspec's `HTTPFileSystem(get_client=)` and aiohttp's `TCPConnector(socket_factory=)`, which is asked for each
address that is connected to, after names are looked up.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an address of IPv4 in its last four bytes
_CONNECT_S = 10.0
_READ_S = 30.0  # until the next bytes


def client_for(address: str, *, inner: bool) -> Callable[..., Awaitable[Any]]:
    """What makes the HTTP session for a source; with `inner` its own host may be one of the inner network."""
    import aiohttp

    host = urlsplit(address).hostname or ""

    def connect(found: Any) -> socket.socket:
        family, kind, protocol, _, (ip, *_) = found
        # As strings: an address of IPv6 may come with its zone.
        if not _is_public(ip) and not (inner and ip in _addresses(host)):
            said = f"{ip} is an address of the inner network, which store.sources does not name"
            raise PermissionError(errno.EACCES, said)
        return socket.socket(family, kind, protocol)

    async def session(**options: Any) -> Any:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
        connector = aiohttp.TCPConnector(socket_factory=connect)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, **options)

    return session


def _is_public(ip: str) -> bool:
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(address.packed[-4:]) if address in _NAT64 else None
        address = address.ipv4_mapped or address.sixtofour or translated or address
    return address.is_global and not address.is_multicast


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
