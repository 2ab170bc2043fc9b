from __future__ import annotations

import logging
from pathlib import Path

import pytest

from xloom.adapters.manifest import Entry, Manifest, ManifestFile, generation_of
from xloom.protocol import Overrides, XloomError


def entry(name: str, generation: str = "a" * 64) -> Entry:
    return Entry(name, "xlora", generation, 8, ("q_proj",), 100, "/somewhere", Overrides(top_k=2), 12.5)


def test_what_was_saved_is_loaded_by_a_new_process(tmp_path: Path) -> None:
    manifest = Manifest().with_entry(entry("one")).with_entry(entry("two"))
    ManifestFile(tmp_path).save(manifest)
    assert ManifestFile(tmp_path).load() == manifest
    assert manifest.version == 2
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "manifest.json.bak"}


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "gone"])
def test_a_damaged_manifest_is_recovered_and_said_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Manifest().with_entry(entry("one")).with_entry(entry("two"))
    file = ManifestFile(tmp_path)
    file.save(manifest)
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "noise": b"\xff\xfe{}"}[damage])
    with caplog.at_level(logging.WARNING):
        recovered = file.load()
    assert recovered.entries == manifest.entries
    assert recovered.version > manifest.version + 1  # beyond what the damaged copy may have stood at
    assert "went back to" in caplog.text
    assert file.load() == recovered  # mended


def test_two_damaged_copies_are_an_error_and_not_an_empty_store(tmp_path: Path) -> None:
    file = ManifestFile(tmp_path)
    file.save(Manifest().with_entry(entry("one")))
    for path in tmp_path.iterdir():
        path.write_bytes(b"{")
    with pytest.raises(XloomError) as caught:
        file.load()
    assert caught.value.code == "manifest_corrupt"


def test_replacing_keeps_the_place_and_raises_the_version() -> None:
    manifest = Manifest().with_entry(entry("one")).with_entry(entry("two"))
    replaced = manifest.with_entry(entry("one", "b" * 64))
    assert [(item.name, item.generation[0]) for item in replaced.entries] == [("one", "b"), ("two", "a")]
    assert replaced.without("one").version == replaced.version + 1 == 4


def test_a_generation_tells_apart_names_contents_and_where_files_end() -> None:
    files = {"a": b"12", "b": b"3"}
    different = [{"a": b"1", "b": b"23"}, {"a": b"12", "c": b"3"}, {"a": b"12", "b": b"4"}, {"a": b"12"}]
    assert generation_of(files) == generation_of(dict(reversed(files.items())))
    assert len({generation_of(item) for item in [files, *different]}) == 5
