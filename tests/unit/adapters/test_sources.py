from __future__ import annotations

import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from xloom.adapters import sources
from xloom.adapters.source_rules import SourceRules
from xloom.protocol import XloomError


def weights(size: int) -> bytes:
    """A safetensors file of one tensor of so many bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def make_source(folder: Path) -> Path:
    (folder / "0").mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights(7))
    (folder / "0" / "adapter_model.safetensors").write_bytes(weights(5))
    (folder / "README.md").write_text("not an adapter file")
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


KEPT = {"adapter_config.json", "adapter_model.safetensors", "0/adapter_model.safetensors"}


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_local_folder_gives_its_json_and_safetensors_alone(tmp_path: Path, prefix: str) -> None:
    sources.fetch(f"{prefix}{make_source(tmp_path / 'source')}", tmp_path / "into")
    assert names_in(tmp_path / "into") == KEPT
    assert (tmp_path / "into/0/adapter_model.safetensors").read_bytes() == weights(5)


def test_an_fsspec_url_gives_the_same_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(make_source(tmp_path / "source")), "/bucket/adapter", recursive=True)
    try:
        sources.fetch("memory://bucket/adapter", tmp_path / "into")
    finally:
        memory.rm("/bucket", recursive=True)
    assert names_in(tmp_path / "into") == KEPT


def test_a_folder_of_an_http_server_gives_the_same_files(tmp_path: Path) -> None:
    handler = partial(_Quiet, directory=str(make_source(tmp_path / "source")))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            sources.fetch(url, tmp_path / "into")
            sources.fetch(f"{url}/0/", tmp_path / "inner")
        finally:
            server.shutdown()
    assert names_in(tmp_path / "into") == KEPT
    assert (tmp_path / "into/0/adapter_model.safetensors").read_bytes() == weights(5)
    assert names_in(tmp_path / "inner") == {"adapter_model.safetensors"}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "source", ["/nowhere/at/all", "memory://nothing/here", "just-a-word", "three/part/name", "file:///nowhere/at/all"]
)
def test_a_source_that_is_not_there_is_source_not_found(tmp_path: Path, source: str) -> None:
    with pytest.raises(XloomError) as caught:
        sources.fetch(source, tmp_path)
    assert (caught.value.code, caught.value.status) == ("source_not_found", 404)
    assert source in caught.value.message


def test_the_hub_without_a_network_is_source_unreachable(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught:
        sources.fetch("some-org/some-adapter", tmp_path)
    assert caught.value.code == "source_unreachable"


@pytest.mark.parametrize("source", ["nosuchscheme://bucket/x", "simplecache::memory://bucket/x"])
def test_a_url_nothing_can_read_is_source_unsupported(tmp_path: Path, source: str) -> None:
    with pytest.raises(XloomError) as caught:
        sources.fetch(source, tmp_path)
    assert caught.value.code == "source_unsupported"


def test_a_failing_filesystem_is_source_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", fail)
    with pytest.raises(XloomError) as caught:
        sources.fetch("memory://bucket/adapter", tmp_path)
    assert caught.value.code == "source_unreachable"
    assert "no route to host" in caught.value.message


@pytest.mark.parametrize("files", [["adapter_model.bin"], ["x.pkl"], ["a.safetensors", "0/adapter_model.pt"]])
def test_pickled_weights_are_refused(files: list[str]) -> None:
    with pytest.raises(XloomError) as caught:
        sources.select({"adapter_config.json": 2} | dict.fromkeys(files, 1), "source", sources.Limits())
    assert caught.value.code == "pickle_refused"


def test_pickle_beside_safetensors_is_left_behind() -> None:
    files = {"adapter_model.safetensors": 1, "adapter_model.bin": 1, "optimizer.pt": 1, "old/scheduler.pt": 1}
    assert sources.select(files, "source", sources.Limits()) == ["adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "/etc/evil.json", "a\\..\\evil.json"])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(XloomError) as caught:
        sources.select({name: 1}, "source", sources.Limits())
    assert caught.value.code == "unsafe_path"


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_links_that_lead_out_are_refused(tmp_path: Path, linked: str) -> None:
    source = make_source(tmp_path / "source")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.json").write_text("secret")
    os.symlink(secret if linked == "folder" else secret / "key.json", source / "link.json")
    with pytest.raises(XloomError) as caught:
        sources.fetch(str(source), tmp_path / "into")
    assert caught.value.code == "unsafe_path"
    assert not names_in(tmp_path / "into")


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    os.symlink("adapter_config.json", source / "same.json")
    sources.fetch(str(source), tmp_path / "into")
    assert (tmp_path / "into/same.json").read_text() == "{}"


@pytest.mark.parametrize("limits", [sources.Limits(files=2), sources.Limits(size=10)])
def test_a_source_over_the_limits_is_refused_before_it_is_copied(tmp_path: Path, limits: sources.Limits) -> None:
    with pytest.raises(XloomError) as caught:
        sources.fetch(str(make_source(tmp_path / "source")), tmp_path / "into", SourceRules(limits=limits))
    assert caught.value.code == "source_too_large"
    assert not names_in(tmp_path / "into")


def hub_snapshot(folder: Path) -> Path:
    """A repository as the hub's cache keeps it: a snapshot of links into its blobs."""
    source = make_source(folder / "source")
    snapshot = folder / "models--org--name" / "snapshots" / "abc"
    blobs = folder / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(sorted(KEPT)):
        (blobs / str(number)).write_bytes((source / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.relpath(blobs / str(number), (snapshot / name).parent), snapshot / name)
    return snapshot


def fake_hub(monkeypatch: pytest.MonkeyPatch, snapshot: Path, listing: dict[str, int]) -> list[dict[str, object]]:
    calls: list[dict[str, object]] = []

    def model_info(_: object, name: str, **options: object) -> SimpleNamespace:
        siblings = [SimpleNamespace(rfilename=file, size=size) for file, size in listing.items()]
        return SimpleNamespace(sha="abc", siblings=siblings)

    def snapshot_download(name: str, **options: object) -> str:
        calls.append({"name": name, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_repository_is_copied_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, hub_snapshot(tmp_path), dict.fromkeys(KEPT, 1))
    sources.fetch("org/name@main", tmp_path / "into")
    assert names_in(tmp_path / "into") == KEPT
    assert not any(path.is_symlink() for path in (tmp_path / "into").rglob("*"))
    wanted = {"allow_patterns": ["*.json", "*.safetensors"], "local_files_only": False}
    assert calls == [{"name": "org/name", "revision": "abc"} | wanted]


def test_a_hub_that_is_down_gives_what_its_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, hub_snapshot(tmp_path), {})

    def fail(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    sources.fetch("org/name", tmp_path / "into")
    assert names_in(tmp_path / "into") == KEPT
    assert calls[0]["revision"] is None
    assert calls[0]["local_files_only"] is True  # of what was not listed nobody knows the size


@pytest.mark.parametrize("kind", ["RepositoryNotFoundError", "GatedRepoError"])
def test_a_repository_the_hub_refuses_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(*_: object, **__: object) -> None:
        response = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
        raise getattr(errors, kind)("refused", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(XloomError) as caught:
        sources.fetch("org/name", tmp_path / "into")
    assert caught.value.code == {"GatedRepoError": "source_unreachable"}.get(kind, "source_not_found")


@pytest.mark.parametrize(
    ("listing", "code"),
    [
        ({"adapter_config.json": 1, "adapter_model.bin": 1}, "pickle_refused"),
        ({"adapter_model.safetensors": 2**50}, "source_too_large"),
    ],
)
def test_a_hub_repository_is_refused_by_its_listing_without_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: dict[str, int], code: str
) -> None:
    calls = fake_hub(monkeypatch, hub_snapshot(tmp_path), listing)
    with pytest.raises(XloomError) as caught:
        sources.fetch("org/name", tmp_path / "into")
    assert caught.value.code == code
    assert not calls


def test_a_registered_scheme_is_served_by_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_SCHEMES", dict(sources._SCHEMES))
    seen = []
    sources.register("oci", lambda address, into, budget: seen.append(address))
    sources.fetch("oci://registry/adapter", tmp_path)
    assert seen == ["oci://registry/adapter"]
