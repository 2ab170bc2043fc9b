"""A port is one deployment's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local_cluster import free_port
from xloom.protocol import XloomError
from xloom.router import port_claim
from xloom.router.port_claim import PortClaim, check_free


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(port_claim.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture
def claim() -> Iterator[PortClaim]:
    made = PortClaim("127.0.0.1", free_port(), "mine")
    yield made
    made.close()


def port_of(claim: PortClaim) -> int:
    port: int = claim.socket.getsockname()[1]
    return port


def refused(host: str, port: int, owner: str) -> str:
    with pytest.raises(XloomError) as caught:
        PortClaim(host, port, owner)
    assert caught.value.code == "port_in_use"
    return caught.value.message


def test_a_deployments_routers_share_a_port_and_another_is_refused(claim: PortClaim) -> None:
    sibling = PortClaim("127.0.0.1", port_of(claim), "mine")
    assert "another xloom deployment" in refused("127.0.0.1", port_of(claim), "other")
    claim.close()
    assert "another xloom deployment" in refused("127.0.0.1", port_of(sibling), "other")
    sibling.close()


def test_a_port_that_was_let_go_is_anybodys(claim: PortClaim) -> None:
    port = port_of(claim)
    claim.close()
    other = PortClaim("127.0.0.1", port, "other")
    assert port_of(other) == port
    other.close()


def test_a_wider_address_does_not_cover_anothers(claim: PortClaim) -> None:
    refused("0.0.0.0", port_of(claim), "other")
    with pytest.raises(XloomError):
        check_free("127.0.0.1", port_of(claim))


def test_a_stranger_that_shares_its_port_is_noticed() -> None:
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        refused("127.0.0.1", stranger.getsockname()[1], "mine")


def test_any_port_is_never_shared() -> None:
    claims = [PortClaim("127.0.0.1", 0, "mine") for _ in range(2)]
    assert port_of(claims[0]) != port_of(claims[1])
    for each in claims:
        each.close()


def test_a_folder_that_is_a_link_is_not_trusted(folder: Path) -> None:
    (folder / f"xloom-ports-{os.getuid()}").symlink_to(folder)
    assert "not a folder of this user's" in refused("127.0.0.1", free_port(), "mine")
