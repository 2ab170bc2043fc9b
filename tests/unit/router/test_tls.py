"""Connections where Ray's TLS is on: encrypted, and only between ends that one authority has signed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.certificates import DAY, Authority, Certificate
from tests.fakes import expected_tokens, until
from tests.fleet import Fleet, request
from xloom.protocol import Hello, XloomError
from xloom.wire import tcp
from xloom.wire.channel import Channel
from xloom.wire.frames import MAX_ROUTER_FRAME, pack
from xloom.wire.greeting import PROTOCOL
from xloom.wire.tcp import TCP, TcpChannel
from xloom.wire.tls import client_context, server_context

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def certificate(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Certificate:
    """TLS is on, with one certificate for both ends, as in Ray."""
    made = authority.certificate()
    made.turn_on(monkeypatch)
    return made


@pytest.fixture
async def fleet(certificate: Certificate) -> AsyncIterator[Fleet]:
    made = Fleet()
    await made.add("a")
    yield made
    await made.close()


class Tap:
    """A wire between a router and a replica that keeps what goes over it."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._copies: list[asyncio.Task[None]] = []
        self.seen = bytearray()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        for copy in (self._copy(reader, far_writer), self._copy(far_reader, writer)):
            self._copies.append(asyncio.create_task(copy))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                self.seen += data
                writer.write(data)
        writer.close()

    async def close(self) -> None:
        self._server.close()
        await asyncio.gather(*self._copies)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])  # Ray's actors run on uvloop where it is installed
@pytest.mark.parametrize("encrypted", [True, False])  # without: that the tap would see it
def test_nobody_between_reads_what_is_sent(
    run: Run, encrypted: bool, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    if encrypted:
        authority.certificate().turn_on(monkeypatch)

    async def serve() -> None:
        fleet = Fleet()
        await fleet.add("a")
        info = fleet.infos["a"]
        tap = Tap(info.host, info.port)
        fleet.infos["a"] = replace(info, port=await tap.start())
        fleet.dispatcher.start()
        fleet.dispatcher.submit(request("told-to-nobody"))
        await until(lambda: "told-to-nobody" in fleet.finished)
        assert fleet.tokens["told-to-nobody"] == expected_tokens([1, 2, 3], 8)
        await fleet.close()
        await tap.close()
        assert (b"told-to-nobody" in tap.seen) is not encrypted
        assert (b"router" in tap.seen) is not encrypted  # nor the greeting

    run(serve())


@pytest.mark.parametrize("shown", ["nothing", "none", "another authority's", "an expired one"])
async def test_who_shows_no_certificate_of_the_authority_is_not_greeted(
    shown: str, fleet: Fleet, authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    context = None
    if shown != "nothing":
        context = ssl.create_default_context(cafile=str(certificate.authority))
        context.check_hostname = False
    if shown == "another authority's":
        others = Authority(tmp_path, "another").certificate()
        context.load_cert_chain(others.certificate, others.key)
    elif shown == "an expired one":
        old = authority.certificate(-DAY)
        context.load_cert_chain(old.certificate, old.key)
    answer = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):  # a refusal, as TLS says it
        reader, writer = await asyncio.open_connection(fleet.infos["a"].host, fleet.infos["a"].port, ssl=context)
        channel = TcpChannel(reader, writer)
        channel.send(pack(Hello(PROTOCOL, "router", b"n" * 32)))
        answer = await asyncio.wait_for(reader.read(1 << 16), 5)
        channel.abort()
    assert b"challenge" not in answer
    assert not fleet.servers["a"]._connections._strangers


async def test_a_router_does_not_greet_a_replica_of_another_authority(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet()
    Authority(tmp_path, "another").certificate().turn_on(monkeypatch)
    await fleet.add("a")  # it has its certificate now
    authority.certificate().turn_on(monkeypatch)
    with caplog.at_level(logging.WARNING):
        fleet.dispatcher.start()
        await until(lambda: "certificate verify failed" in caplog.text)
    assert not fleet.dispatcher.directory.links
    assert not fleet.servers["a"]._connections._strangers
    await fleet.close()


async def test_a_stranger_that_begins_no_handshake_is_let_go(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "GREETING_TIMEOUT_S", 0.05)
    served: list[Channel] = []

    async def serve(channel: Channel) -> None:
        served.append(channel)

    listening = await TCP.listen("127.0.0.1", serve)
    reader, writer = await asyncio.open_connection(*listening.address)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert not served
    writer.close()
    listening.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.usefixtures("certificate")
def test_large_frames_pass_and_a_peer_that_does_not_read_is_cut_off(run: Run) -> None:
    async def serve() -> None:
        accepted: asyncio.Queue[Channel] = asyncio.Queue()
        done = asyncio.Event()

        async def accept(channel: Channel) -> None:
            accepted.put_nowait(channel)
            await done.wait()

        listening = await TCP.listen("127.0.0.1", accept)
        near = await TCP.connect(*listening.address)
        assert isinstance(near, TcpChannel)
        far = await accepted.get()
        frame = bytes(range(256)) * (MAX_ROUTER_FRAME // 256)
        near.send(frame)
        assert await far.receive(MAX_ROUTER_FRAME) == frame
        near._max_unsent = 1 << 20
        for _ in range(64):
            near.send(bytes(1 << 20))
        await until(near._writer.transport.is_closing)
        near.send(b"ignored")
        done.set()
        near.abort()
        far.abort()
        listening.close()

    run(serve())


def test_what_ray_accepts_as_its_own_certificate_is_accepted(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that signs itself, as Ray's own tools make it: its authority is the certificate."""
    made = replace(authority.certificate(), certificate=authority.file, key=authority.key_file)
    made.turn_on(monkeypatch)
    for context in (server_context(), client_context()):
        assert context is not None
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT


@pytest.mark.parametrize("name", ["RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"])
def test_without_one_of_the_three_files_nothing_is_trusted(
    name: str, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the authority every certificate that a public one has signed would do."""
    monkeypatch.delenv(name)
    with pytest.raises(XloomError) as caught:
        server_context()
    assert caught.value.code == "tls_incomplete"
    assert name in caught.value.message
    monkeypatch.setenv(name, "/nowhere")
    with pytest.raises(XloomError) as caught:
        client_context()
    assert caught.value.code == "tls_incomplete"
    assert "/nowhere" in caught.value.message
