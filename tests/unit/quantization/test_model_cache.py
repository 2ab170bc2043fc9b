"""The cache of quantised models: made once, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from xloom.protocol import XloomError
from xloom.quantization.model_cache import DONE_FILE, QuantisedModelCache, model_digest, read_done

KEY = "k" * 64


def write(folder: Path) -> dict[str, Any]:
    (folder / "model.safetensors").write_bytes(b"weights")
    return {"seconds": 1.0}


def left_over(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock"))


def test_a_model_is_made_once_and_then_found(tmp_path: Path) -> None:
    cache, made = QuantisedModelCache(tmp_path), []

    def make(folder: Path) -> dict[str, Any]:
        made.append(folder)
        return write(folder)

    first, second = cache.ensure(KEY, make), cache.ensure(KEY, make)
    assert first == second == cache.path(KEY)
    assert len(made) == 1
    assert read_done(first)["files"] == {"model.safetensors": 7}
    assert left_over(tmp_path) == [KEY]


def test_concurrent_callers_make_it_once(tmp_path: Path) -> None:
    made, together = [], threading.Barrier(4)

    def make(folder: Path) -> dict[str, Any]:
        made.append(folder)
        time.sleep(0.3)
        return write(folder)

    def call() -> Path:
        together.wait(10)
        return QuantisedModelCache(tmp_path).ensure(KEY, make)

    with ThreadPoolExecutor(4) as pool:
        paths = {future.result() for future in [pool.submit(call) for _ in range(4)]}
    assert paths == {tmp_path / KEY}
    assert len(made) == 1


def test_failed_work_leaves_nothing_and_the_next_call_works(tmp_path: Path) -> None:
    cache = QuantisedModelCache(tmp_path)

    def fail(folder: Path) -> dict[str, Any]:
        write(folder)
        raise XloomError("isq_failed", "no")

    with pytest.raises(XloomError):
        cache.ensure(KEY, fail)
    assert left_over(tmp_path) == []
    assert cache.ensure(KEY, write) == tmp_path / KEY


@pytest.mark.parametrize("damage", ["lost", "cut", "undone"])
def test_a_damaged_model_is_made_anew(tmp_path: Path, damage: str) -> None:
    cache = QuantisedModelCache(tmp_path)
    folder = cache.ensure(KEY, write)
    if damage == "lost":
        (folder / "model.safetensors").unlink()
    elif damage == "cut":
        (folder / "model.safetensors").write_bytes(b"w")
    else:
        (folder / DONE_FILE).write_text("{")
    assert cache.find(KEY) is None
    assert (cache.ensure(KEY, write) / "model.safetensors").read_bytes() == b"weights"


HOLDER = """
import sys, time
from pathlib import Path
from xloom.quantization.model_cache import QuantisedModelCache
def make(folder):
    (folder / "model.safetensors").write_bytes(b"half")
    print("holding", flush=True)
    time.sleep(600)
QuantisedModelCache(Path(sys.argv[1])).ensure(sys.argv[2], make)
"""


def test_a_killed_holder_frees_the_lock_and_what_it_left_is_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(30)
    assert left_over(tmp_path) != []
    assert QuantisedModelCache(tmp_path).ensure(KEY, write) == tmp_path / KEY
    assert left_over(tmp_path) == [KEY]


def test_a_folder_that_can_not_be_written_is_an_error_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(XloomError) as caught:
        QuantisedModelCache(tmp_path / "file" / "cache").ensure(KEY, write)
    assert caught.value.code == "isq_cache_unwritable"


def test_the_digest_follows_every_file(tmp_path: Path) -> None:
    model, memory = tmp_path / "model", tmp_path / "memory"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"a": 1}))
    (model / "model.safetensors").write_bytes(b"1")
    first = model_digest(model, memory)
    assert model_digest(model, memory) == first
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_digest(copy, memory) == first  # content, not place
    (copy / "model.safetensors").write_bytes(b"22")
    assert model_digest(copy, memory) != first


def test_a_blob_of_the_hubs_cache_is_not_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / ("a" * 64)).write_bytes(b"1")
    (snapshot / "model.safetensors").symlink_to(blobs / ("a" * 64))
    first = model_digest(snapshot, tmp_path / "memory")
    (blobs / ("a" * 64)).write_bytes(b"2")  # never happens: the name is the content's hash
    assert model_digest(snapshot, tmp_path / "memory") == first
