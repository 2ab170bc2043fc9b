"""TLS between router and replica where Ray's own is on: the certificates Ray has, and both ends show one.

Relies on Ray 2.60: RAY_USE_TLS, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT, which its processes read
(ray._common.tls_utils).
"""

from __future__ import annotations

import os
import ssl

from xloom.protocol import XloomError

_CERTIFICATE, _KEY, _AUTHORITY = _FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def is_on() -> bool:
    """Whether Ray's connections are encrypted."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def server_context() -> ssl.SSLContext | None:
    """For a replica; None where TLS is off. Raises `XloomError` (tls_incomplete)."""
    return _context(ssl.Purpose.CLIENT_AUTH) if is_on() else None


def client_context() -> ssl.SSLContext | None:
    """For a router; None where TLS is off. Raises `XloomError` (tls_incomplete)."""
    return _context(ssl.Purpose.SERVER_AUTH) if is_on() else None


def _context(purpose: ssl.Purpose) -> ssl.SSLContext:
    """Peers are known by the authority that signed them, as Ray's are, not by names: replicas are pods and actors."""
    files = {name: os.environ.get(name, "") for name in _FILES}
    missing = [name for name, file in files.items() if not file]
    if missing:  # without an authority, everybody whom a public one has signed would be let in
        raise _incomplete(f"RAY_USE_TLS is on and {', '.join(missing)} not set.")
    try:
        context = ssl.create_default_context(purpose, cafile=files[_AUTHORITY])
        context.load_cert_chain(files[_CERTIFICATE], files[_KEY])
    except OSError as error:  # ssl.SSLError is one
        named = ", ".join(f"{name} ({file})" for name, file in files.items())
        raise _incomplete(f"One of {named} can't be used: {error}.") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13's default, which what Ray accepts may not pass
    return context


def _incomplete(message: str) -> XloomError:
    return XloomError("tls_incomplete", message, "Give the processes of this node the three files Ray needs.", 500)
