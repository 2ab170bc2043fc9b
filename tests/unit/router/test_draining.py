"""A router that is to end: how it is asked, and how it says that it has answered."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest

from xloom.router.draining import ASKED, PERIOD_S, Draining, folder_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return folder_of(8000)


async def test_a_router_is_there_until_it_has_answered_what_it_has(folder: Path) -> None:
    told: list[bool] = []
    answers = 1
    router = Draining(8000, lambda: answers, told.append)
    router.start()
    own = folder / str(os.getpid())
    answers = 0
    router.look()
    assert (own.exists(), told) == (True, [])  # idle, and not asked
    (folder / ASKED).touch()
    answers = 1
    router.look()
    assert (own.exists(), told) == (True, [True])
    answers = 0
    router.look()
    assert not own.exists()
    answers = 1  # one more came on a connection that was open
    router.look()
    assert own.exists()
    (folder / ASKED).unlink()
    router.look()
    assert told == [True, False]
    router.close()
    assert not own.exists()


async def test_it_looks_by_itself(folder: Path) -> None:
    asked = asyncio.Event()
    router = Draining(8000, lambda: 0, lambda _: asked.set())
    router.start()
    (folder / ASKED).touch()
    await asyncio.wait_for(asked.wait(), 20 * PERIOD_S)
    router.close()


async def test_a_folder_of_somebody_elses_asks_nothing(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "8000").mkdir(parents=True)
    folder.parent.symlink_to(elsewhere)
    router = Draining(8000, lambda: 0, lambda _: None)
    router.start()
    assert list((elsewhere / "8000").iterdir()) == []
    router.close()
