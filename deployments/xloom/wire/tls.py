"""TLS between router and replica where Ray's own is on: the certificates Ray has, and both ends show one.

Relies on Ray 2.60: RAY_USE_TLS, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT, which its processes read.
"""

from __future__ import annotations

import os
import ssl


def is_on() -> bool:
    """Whether Ray's connections are encrypted."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def server_context() -> ssl.SSLContext | None:
    """For a replica; None where TLS is off. Raises OSError when a file is missing."""
    return _context(ssl.Purpose.CLIENT_AUTH) if is_on() else None


def client_context() -> ssl.SSLContext | None:
    """For a router; None where TLS is off. Raises OSError when a file is missing."""
    return _context(ssl.Purpose.SERVER_AUTH) if is_on() else None


def _context(purpose: ssl.Purpose) -> ssl.SSLContext:
    """Peers are known by the authority that signed them, as Ray's are, not by names: replicas are pods and actors."""
    authority = os.environ.get("RAY_TLS_CA_CERT") or None
    context = ssl.create_default_context(purpose, cafile=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(os.environ.get("RAY_TLS_SERVER_CERT", ""), os.environ.get("RAY_TLS_SERVER_KEY", ""))
    return context
