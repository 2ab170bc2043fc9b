"""Local folders made of links, and adapters in a folder of their source."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.adapters.test_sources import KEPT, fake_hub, hub_snapshot, make_source, names_in
from xloom.adapters import sources
from xloom.protocol import XloomError


def refused(source: Path | str, into: Path) -> str:
    with pytest.raises(XloomError) as caught:
        sources.fetch(str(source), into)
    assert not names_in(into)
    return caught.value.code


def test_a_snapshot_of_the_hubs_cache_is_a_local_folder_too(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    sources.fetch(str(snapshot), tmp_path / "into")
    assert names_in(tmp_path / "into") == KEPT
    assert not any(path.is_symlink() for path in (tmp_path / "into").rglob("*"))
    sources.fetch(str(snapshot / "0"), tmp_path / "inner")
    assert names_in(tmp_path / "inner") == {"adapter_model.safetensors"}


@pytest.mark.parametrize("escape", ["file", "blob", "blobs", "neighbour"])
def test_a_snapshots_links_lead_to_its_own_blobs_alone(tmp_path: Path, escape: str) -> None:
    snapshot = hub_snapshot(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    (tmp_path / "secret.json").write_text("secret")
    if escape == "file":
        os.symlink(tmp_path / "secret.json", snapshot / "more.json")
    elif escape == "blob":
        os.symlink(tmp_path / "secret.json", blobs / "9")
        os.symlink("../../blobs/9", snapshot / "more.json")
    elif escape == "blobs":
        blobs.rename(tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", blobs)
    else:
        (snapshot.parent / "other").mkdir()
        (snapshot.parent / "other" / "more.json").write_text("{}")
        os.symlink("../other/more.json", snapshot / "more.json")
    assert refused(snapshot, tmp_path / "into") == "unsafe_path"


def test_a_volume_of_kubernetes_is_read_through_its_links(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    make_source(volume / "..2026_01_01")
    os.symlink("..2026_01_01", volume / "..data")
    for name in ("adapter_config.json", "adapter_model.safetensors", "0"):
        os.symlink(f"..data/{name}", volume / name)
    sources.fetch(str(volume), tmp_path / "into")
    assert names_in(tmp_path / "into") == KEPT


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    os.symlink("..", source / "0" / "up")
    assert refused(source, tmp_path / "into") == "unsafe_path"
    os.symlink("itself.json", source / "itself.json")
    (source / "0" / "up").unlink()
    sources.fetch(str(source), tmp_path / "into")
    assert names_in(tmp_path / "into") == KEPT


def test_an_endless_tree_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    source.joinpath(*["deep"] * 40).mkdir(parents=True)
    assert refused(source, tmp_path / "into") == "source_too_large"


def test_the_one_adapter_of_a_source_is_found_in_its_folder(tmp_path: Path) -> None:
    make_source(tmp_path / "repository" / "runs" / "best")
    assert sources.adapter_folder(tmp_path / "repository", "org/name") == tmp_path / "repository/runs/best"
    make_source(tmp_path / "repository" / "runs" / "last")
    with pytest.raises(XloomError, match="runs/best, runs/last"):
        sources.adapter_folder(tmp_path / "repository", "org/name")
    (tmp_path / "repository" / "adapter_config.json").write_text("{}")
    assert sources.adapter_folder(tmp_path / "repository", "org/name") == tmp_path / "repository"


def test_a_folder_of_a_hub_repository_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = dict.fromkeys(KEPT, 1) | {"big/pytorch_model.bin": 2**50}
    calls = fake_hub(monkeypatch, hub_snapshot(tmp_path), listing)
    sources.fetch("hf://org/name/0@main", tmp_path / "into")
    assert names_in(tmp_path / "into") == {"adapter_model.safetensors"}
    assert [call["allow_patterns"] for call in calls] == [["0/*.json", "0/*.safetensors"]]
    assert refused("hf://org/name/nowhere", tmp_path / "other") == "source_not_found"
    assert refused("hf://org/name/../other", tmp_path / "other") == "unsafe_path"
