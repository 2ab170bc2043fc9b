"""A request as bytes: encoded and measured before anything knows of it, and read with limits at the other end."""

from __future__ import annotations

from typing import Any

import msgspec

from xloom.protocol import TokenRequest, XloomError
from xloom.wire.frames import UNENCODABLE, UNREADABLE

MAX_REQUEST = 8 * 1024 * 1024  # bytes; a prompt of a million tokens takes 5 MB
MAX_ITEMS = 1 << 20  # in its free-form fields: a bias for each of 256,000 tokens is half of that
MAX_DEPTH = 100  # of lists and mappings in them

_FREE_FORM = ("sampling", "extra")  # fields that hold whatever a client nested in them

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(TokenRequest)
_fields = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_mapping = msgspec.msgpack.Decoder(dict[int | float | str, msgspec.Raw])
_sequence = msgspec.msgpack.Decoder(list[msgspec.Raw])


def encode_request(request: TokenRequest) -> bytes:
    """The bytes a replica can read it from. Raises `XloomError`: unencodable_request, request_too_large."""
    try:
        body = _encoder.encode(request)
    except UNENCODABLE as error:
        raise _unencodable(request, error) from None
    _measure(body)
    return body


def decode_request(body: bytes) -> TokenRequest:
    """What `encode_request` was given. Raises `XloomError`: bad_request_frame, request_too_large."""
    try:
        _measure(body)
        return _decoder.decode(body)
    except UNREADABLE as error:
        raise XloomError("bad_request_frame", f"The replica can't read the request: {error}", status=400) from None


def _unencodable(request: TokenRequest, error: BaseException) -> XloomError:
    ours = {"cache_salt": request.cache_salt, "priority": request.priority, "mixture": request.weights}
    places = {**request.sampling, **ours, **request.extra}
    for name, value in places.items():
        try:
            _encoder.encode(value)
        except UNENCODABLE as cause:
            return XloomError(
                "unencodable_request",
                f"{name} holds {_complaint(cause)}.",
                "Send text in UTF-8, integers of at most 64 bits, and shallow JSON.",
            )
    return XloomError("unencodable_request", f"The request holds {_complaint(error)}.", "Mend the request.")


def _complaint(error: BaseException) -> str:
    if isinstance(error, UnicodeError):
        return "text that is not Unicode (half of a surrogate pair)"
    if isinstance(error, OverflowError):
        return "an integer of more than 64 bits"
    if isinstance(error, RecursionError):
        return "lists or mappings nested too deeply"
    return f"what can't be sent to a replica ({error})"


def _measure(body: bytes) -> None:
    """Hold an encoded request against the limits, without making its values."""
    if len(body) > MAX_REQUEST:
        raise _too_large(f"{len(body)} bytes", f"{MAX_REQUEST} bytes")
    fields = _fields.decode(body)
    counted = 0
    level: list[Any] = [fields[name] for name in _FREE_FORM if name in fields]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_large(f"over {MAX_DEPTH} levels of lists and mappings", f"{MAX_DEPTH} levels")
        below: list[Any] = []
        for raw in level:
            size, is_mapping = _container(raw)
            counted += size
            if counted > MAX_ITEMS:
                raise _too_large(f"over {MAX_ITEMS} values", f"{MAX_ITEMS} values")
            inner = _mapping.decode(raw).values() if is_mapping else _sequence.decode(raw)
            below.extend(value for value in inner if _is_container(value))
        level = below


def _is_container(raw: msgspec.Raw) -> bool:
    """Whether msgpack's first byte says list or mapping."""
    first = memoryview(raw)[0]
    return 0x80 <= first <= 0x9F or 0xDC <= first <= 0xDF


def _container(raw: msgspec.Raw) -> tuple[int, bool]:
    """The number of values in a list or mapping, from its header alone, and whether it is a mapping."""
    view = memoryview(raw)
    first = view[0]
    if first <= 0x9F:
        return first & 0x0F, first < 0x90
    width = 2 if first in (0xDC, 0xDE) else 4
    return int.from_bytes(view[1 : 1 + width], "big"), first >= 0xDE


def _too_large(what: str, limit: str) -> XloomError:
    return XloomError(
        "request_too_large",
        f"The request comes to {what}; {limit} is the most that travels to a replica.",
        "Send a shorter prompt, or less in logit_bias, structured_outputs and vllm_xargs.",
        413,
    )
