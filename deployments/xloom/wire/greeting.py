"""How a connection begins: one version of the protocol, and both ends prove the token without showing it.

Who listens on a replica's port after it has gone learns nothing, and neither does who connects: each end proves by a
keyed hash over numbers that the other one chose, and over both names.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

import msgspec

from xloom.protocol import (
    Challenge,
    Hello,
    Proof,
    Refused,
    ReplicaFrame,
    RouterFrame,
    TokenRequest,
    XloomError,
)
from xloom.wire.channel import Channel
from xloom.wire.frames import MAX_STRANGER_FRAME, FrameReader, pack

GREETING_TIMEOUT_S = 5.0

_NONCE = 32  # bytes


def _digest() -> str:
    """The version of the protocol: it changes with any field of any message."""
    schema = msgspec.json.encode(msgspec.json.schema(tuple[RouterFrame, ReplicaFrame, TokenRequest]))
    return hashlib.sha256(b"1" + schema).hexdigest()[:16]  # the number: for what the messages' shape does not show


PROTOCOL = _digest()


@dataclass(frozen=True)
class Identity:
    """One end of connections: the secret of its deployment, and its own name."""

    token: bytes
    name: str


async def introduce(channel: Channel, router: Identity, replica_id: str) -> None:
    """The router's part, with the replica it means to reach.

    Raises `XloomError`: version_mismatch, wrong_token, bad_frame; and `replica_gone` when the other end leaves first.
    """
    nonce = secrets.token_bytes(_NONCE)
    channel.send(pack(Hello(PROTOCOL, router.name, nonce)))
    reader: FrameReader[Challenge | Refused] = FrameReader(channel, Challenge | Refused, MAX_STRANGER_FRAME)
    answer = await reader.read()
    if answer is None:
        raise XloomError("replica_gone", "The replica closed the connection in its greeting.", status=503)
    if isinstance(answer, Refused):
        message = f"The replica speaks protocol {answer.protocol} and this router {PROTOCOL}."
        raise XloomError("version_mismatch", message, "Deploy one version of xloom.", 503)
    wanted = _proof(router.token, b"replica", router.name, replica_id, nonce, answer.nonce)
    if answer.replica_id != replica_id or not hmac.compare_digest(answer.proof, wanted):
        message = "What listens there is no replica of this deployment: it does not know the token."
        raise XloomError("wrong_token", message, "Look at what took the port.", 503)
    channel.send(pack(Proof(_proof(router.token, b"router", router.name, replica_id, nonce, answer.nonce))))


async def admit(channel: Channel, replica: Identity) -> str:
    """The replica's part; returns the router's name. Raises `XloomError`: version_mismatch, wrong_token, bad_frame."""
    hello: Hello | None = await FrameReader[Hello](channel, Hello, MAX_STRANGER_FRAME).read()
    if hello is None:
        raise XloomError("bad_frame", "It left without a word.")
    if hello.protocol != PROTOCOL:
        channel.send(pack(Refused(PROTOCOL)))
        message = f"Router {hello.router_id} speaks protocol {hello.protocol} and this replica {PROTOCOL}."
        raise XloomError("version_mismatch", message, "Deploy one version of xloom.", 503)
    nonce = secrets.token_bytes(_NONCE)
    ours = _proof(replica.token, b"replica", hello.router_id, replica.name, hello.nonce, nonce)
    channel.send(pack(Challenge(replica.name, nonce, ours)))
    proof: Proof | None = await FrameReader[Proof](channel, Proof, MAX_STRANGER_FRAME).read()
    theirs = _proof(replica.token, b"router", hello.router_id, replica.name, hello.nonce, nonce)
    if proof is None or not hmac.compare_digest(proof.proof, theirs):
        raise XloomError("wrong_token", "It does not know the deployment's token.", "Look at who connects.", 403)
    return hello.router_id


def _proof(token: bytes, end: bytes, router: str, replica: str, router_nonce: bytes, replica_nonce: bytes) -> bytes:
    """A keyed hash that only this end of this connection can use."""
    told = pack([end, PROTOCOL, router, replica, router_nonce, replica_nonce])
    return hmac.digest(token, told, "sha256")
