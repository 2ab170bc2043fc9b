"""The beginning of a connection: who may speak, and that the token is never shown."""

from __future__ import annotations

import asyncio
import tracemalloc
from dataclasses import dataclass, field

import pytest

from xloom.protocol import Challenge, Hello, Proof, XloomError
from xloom.wire import greeting
from xloom.wire.frames import MAX_STRANGER_FRAME, FrameReader, pack
from xloom.wire.greeting import PROTOCOL, Identity, admit, introduce

TOKEN = b"the-token-of-this-deployment"


@dataclass
class Pipe:
    """One end of a connection within this process, and all that was sent from it."""

    inbox: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    other: Pipe | None = None
    sent: list[bytes] = field(default_factory=list)
    peer: str = "here:1"

    async def receive(self, limit: int) -> bytes | None:
        message = await self.inbox.get()
        assert message is None or len(message) <= limit
        return message

    def send(self, message: bytes | bytearray) -> None:
        assert self.other is not None
        self.sent.append(bytes(message))
        self.other.inbox.put_nowait(bytes(message))

    def close(self) -> None:
        assert self.other is not None
        self.other.inbox.put_nowait(None)

    abort = close


def pipes() -> tuple[Pipe, Pipe]:
    near, far = Pipe(), Pipe()
    near.other, far.other = far, near
    return near, far


async def test_both_ends_prove_the_token_and_never_send_it() -> None:
    near, far = pipes()
    router = asyncio.create_task(introduce(near, Identity(TOKEN, "router-1"), "replica-1"))
    assert await admit(far, Identity(TOKEN, "replica-1")) == "router-1"
    await router
    told = b"".join(near.sent + far.sent)
    assert TOKEN not in told
    assert len(near.sent) == 2
    assert len(far.sent) == 1


async def test_who_took_a_replicas_port_is_recognised_before_anything_is_proved_to_it() -> None:
    near, far = pipes()
    stranger = asyncio.create_task(admit(far, Identity(b"another", "replica-1")))
    with pytest.raises(XloomError) as caught:
        await introduce(near, Identity(TOKEN, "router-1"), "replica-1")
    assert caught.value.code == "wrong_token"
    assert len(near.sent) == 1  # no proof that could be taken elsewhere
    stranger.cancel()


async def test_another_replica_of_the_deployment_is_not_the_one_meant() -> None:
    near, far = pipes()
    other = asyncio.create_task(admit(far, Identity(TOKEN, "replica-2")))
    with pytest.raises(XloomError) as caught:
        await introduce(near, Identity(TOKEN, "router-1"), "replica-1")
    assert caught.value.code == "wrong_token"
    other.cancel()


async def test_a_stranger_learns_nothing_that_lets_it_in() -> None:
    """It asks, and gives back what the replica itself has proved, or a proof of another connection."""
    taken, far = pipes()
    replica = asyncio.create_task(admit(far, Identity(TOKEN, "replica-1")))
    router = asyncio.create_task(introduce(taken, Identity(TOKEN, "router-1"), "replica-1"))
    await asyncio.gather(replica, router)
    old_proof = taken.sent[1]
    for choice in ("its own", "an old one"):
        near, far = pipes()
        replica = asyncio.create_task(admit(far, Identity(TOKEN, "replica-1")))
        near.send(pack(Hello(PROTOCOL, "router-1", b"n" * 32)))
        challenge = await FrameReader[Challenge](near, Challenge, 1024).read()
        assert challenge is not None
        near.send(pack(Proof(challenge.proof)) if choice == "its own" else old_proof)
        with pytest.raises(XloomError) as caught:
            await replica
        assert caught.value.code == "wrong_token"


async def test_two_versions_part_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = pipes()
    newer = "0123456789abcdef"
    near.send(pack(Hello(newer, "router-1", b"n" * 32)))
    with pytest.raises(XloomError) as caught:
        await admit(far, Identity(TOKEN, "replica-1"))
    assert caught.value.code == "version_mismatch"
    assert newer in caught.value.message
    near, far = pipes()
    replica = asyncio.create_task(admit(far, Identity(TOKEN, "replica-1")))
    monkeypatch.setattr(greeting, "PROTOCOL", newer)
    hello = asyncio.create_task(introduce(near, Identity(TOKEN, "router-1"), "replica-1"))
    await asyncio.sleep(0)
    monkeypatch.setattr(greeting, "PROTOCOL", PROTOCOL)
    with pytest.raises(XloomError) as caught:
        await hello
    assert caught.value.code == "version_mismatch"
    await asyncio.gather(replica, return_exceptions=True)


async def test_a_replica_that_leaves_in_its_greeting_is_told_apart() -> None:
    near, far = pipes()
    far.close()
    with pytest.raises(XloomError) as caught:
        await introduce(near, Identity(TOKEN, "router-1"), "replica-1")
    assert caught.value.code == "replica_gone"


HOSTILE = {
    "deep lists": b"\x91" * 900,
    "deep mappings": b"\x81\xa1a" * 300,
    "empty mappings": b"\xdc\x03\x52" + b"\x80" * 850,
    "a list of four thousand million": b"\xdd\xff\xff\xff\xff",
    "a mapping of four thousand million": b"\xdf\xff\xff\xff\xff",
    "four gigabytes of text": b"\xdb\xff\xff\xff\xff",
    "four gigabytes of bytes": b"\xc6\xff\xff\xff\xff",
    "four gigabytes of an extension": b"\xc9\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("field_name", ["", "nonce", "added"])  # the whole frame, a field, or one that is not known
async def test_a_stranger_can_make_a_replica_hold_little(what: str, field_name: str) -> None:
    """Deep, many or announced as large: it costs no more than the kilobyte that was sent."""
    near, far = pipes()
    value = HOSTILE[what]
    if field_name:
        hello = pack({"type": "hello", "protocol": PROTOCOL, "router_id": "r"})
        value = bytes([hello[0] + 1]) + hello[1:] + pack(field_name) + value
    assert len(value) <= MAX_STRANGER_FRAME
    near.send(value)
    tracemalloc.start()
    try:
        with pytest.raises(XloomError) as caught:
            await admit(far, Identity(TOKEN, "replica-1"))
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert caught.value.code == "bad_frame"
    assert not far.sent
