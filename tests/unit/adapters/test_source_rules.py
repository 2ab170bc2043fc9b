"""Where adapters may come from, and how much a hostile source may cost."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from xloom.adapters import inner_network, sources
from xloom.adapters.companions import fetch_companions
from xloom.adapters.copying import copy
from xloom.adapters.http_folder import MOST_PAGE, links
from xloom.adapters.limits import Budget, Limits
from xloom.adapters.source_rules import SourceRules, check_prefixes
from xloom.protocol import XloomError


def refused(source: str, into: Path, rules: SourceRules) -> XloomError:
    with pytest.raises(XloomError) as caught:
        sources.fetch(source, into, rules)
    return caught.value


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


ALLOWED = ("hf://org", "s3://bucket/adapters", "https://models.example.com/a", "gs://")


@pytest.mark.parametrize(
    "source",
    ["org/name", "org/name@main", "hf://org/name", "s3://bucket/adapters", "s3://bucket/adapters/law",
     "https://models.example.com/a/law", "gs://any/where", "hf://org/name/law@main", "hf://org/name@refs/pr/1"],
)  # fmt: skip
def test_what_lies_below_a_prefix_is_allowed(source: str) -> None:
    SourceRules(ALLOWED).check(source)


@pytest.mark.parametrize(
    "source",
    ["other/name", "organisation/name", "s3://bucket/adapters-of-others/x", "s3://bucket", "s3://bucket.evil/adapters/x",
     "https://models.example.com.evil/a/x", "https://user@models.example.com/a/x", "http://models.example.com/a/x",
     "https://models.example.com/b", "http://169.254.169.254/latest", "memory://x/y", "/etc", "~/x", "file:///etc"],
)  # fmt: skip
def test_all_else_is_not(source: str) -> None:
    with pytest.raises(XloomError) as caught:
        SourceRules(ALLOWED).check(source)
    assert (caught.value.code, caught.value.status) == ("source_not_allowed", 403)
    assert "s3://bucket/adapters" in caught.value.cure


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("s3://bucket/adapters/../secret", "unsafe_path"),
        ("https://models.example.com/a/%2e%2e/b", "unsafe_path"),
        ("https://models.example.com/a?x=1", "unsafe_path"),
        ("local:///etc", "source_unsupported"),
        ("file::memory://x", "source_unsupported"),
        ("", "source_not_found"),
        (" ", "source_not_found"),
        (".", "source_not_found"),
        ("./adapters", "source_not_found"),
        ("file://adapters", "source_not_found"),
        ("~nobody-of-that-name/x", "source_not_found"),
        ("org/name/../../x", "source_not_found"),
    ],
)
@pytest.mark.parametrize("rules", [SourceRules(), SourceRules(ALLOWED)])
def test_what_can_lead_elsewhere_is_refused_whatever_is_allowed(
    tmp_path: Path, rules: SourceRules, source: str, code: str
) -> None:
    assert refused(source, tmp_path / "into", rules).code == code


@pytest.mark.parametrize("source", ["hf://org/name", "org/name@law", "hf://org/name@law/x", "hf://org/name@x/law"])
def test_a_revision_is_no_folder_of_a_repository(source: str) -> None:
    with pytest.raises(XloomError) as caught:
        SourceRules(("hf://org/name/law",)).check(source)
    assert caught.value.code == "source_not_allowed"
    SourceRules(("hf://org/name/law",)).check("hf://org/name/law@x/y")


def test_a_local_folder_is_allowed_by_where_it_really_is(tmp_path: Path) -> None:
    outside = folder(tmp_path / "outside" / "code")
    root = tmp_path / "root"
    inside = folder(root / "law")
    (root / "link").symlink_to(outside)
    (tmp_path / "also").symlink_to(root)
    rules = SourceRules((str(tmp_path / "also"),))
    sources.fetch(str(inside), tmp_path / "into", rules)
    assert (tmp_path / "into" / "adapter_config.json").is_file()
    for source in (str(root / "link"), f"{root}/../outside/code", str(outside), f"{root}-other"):
        assert refused(source, tmp_path / "none", rules).code == "source_not_allowed"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("source", "setting"),
    [("/home/me/adapters/law", "'/home/me/adapters'"), ("/law", "'/law'"), ("other/name", "'hf://other'"),
     ("s3://other/adapters/law", "'s3://other/adapters'"), ("http://10.0.0.5/law", "'http://10.0.0.5/law'")],
)  # fmt: skip
def test_a_refusal_says_what_would_allow_it(source: str, setting: str) -> None:
    with pytest.raises(XloomError) as caught:
        SourceRules(ALLOWED).check(source)
    assert f"or add {setting} to store.sources" in caught.value.cure
    SourceRules((setting.strip("'"),)).check(source)


@pytest.mark.parametrize("prefix", ["local:///models", "s3://bucket/*", "~nobody-of-that-name/x", "https://host/?a=b"])
def test_a_prefix_that_holds_nothing_is_refused_at_the_start(prefix: str) -> None:
    check_prefixes(ALLOWED)
    with pytest.raises(XloomError) as caught:
        check_prefixes([*ALLOWED, prefix])
    assert (caught.value.code, "store.sources" in caught.value.message) == ("invalid_settings", True)


@pytest.mark.parametrize("named", ["../code", "/absolute"])
def test_what_a_bundle_names_outside_itself_must_be_allowed_too(tmp_path: Path, named: str) -> None:
    folder(tmp_path / "code")
    path = str(folder(tmp_path / "elsewhere")) if named == "/absolute" else named
    source, fetched = tmp_path / "root" / "blend", tmp_path / "scratch" / "fetched"
    for each in (source, fetched):
        each.mkdir(parents=True)
        (each / "adapter_config.json").write_text(json.dumps({"adapters": {"a": path}}))
    (tmp_path / "root" / "code").symlink_to(tmp_path / "code")  # beside the bundle, and leading out of what is allowed
    with pytest.raises(XloomError) as caught:
        fetch_companions(str(source), fetched, SourceRules((str(tmp_path / "root"),)))
    assert caught.value.code == "source_not_allowed"


def deep(root: Path, depth: int) -> Path:
    folder(root.joinpath(*["d"] * depth))
    return root


def test_deep_many_and_large_are_refused(tmp_path: Path) -> None:
    tree = deep(tmp_path / "tree", 3)
    assert refused(str(tree), tmp_path / "a", SourceRules(limits=Limits(depth=2))).code == "source_too_large"
    sources.fetch(str(tree), tmp_path / "b", SourceRules(limits=Limits(depth=3)))
    for number in range(21):
        (tree / f"{number}.txt").touch()
    assert refused(str(tree), tmp_path / "c", SourceRules(limits=Limits(files=2))).code == "source_too_large"
    os.truncate(tree / "d/d/d/adapter_config.json", 2**40)  # sparse
    assert refused(str(tree), tmp_path / "d", SourceRules()).code == "source_too_large"


def test_what_is_read_whole_must_be_small(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    (source / "tokenizer.json").write_bytes(bytes(5 * 2**20))  # copied and no more
    sources.fetch(str(source), tmp_path / "into", SourceRules())
    (source / "adapter_config.json").write_bytes(bytes(5 * 2**20))
    error = refused(str(source), tmp_path / "none", SourceRules())
    assert (error.code, "adapter_config.json" in error.message) == ("source_too_large", True)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    os.mkfifo(source / "adapter_model.safetensors")
    sources.fetch(str(source), tmp_path / "into", SourceRules(limits=Limits(stall_s=2)))
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["adapter_config.json"]


def test_weights_beyond_the_limit_are_refused_by_their_header(tmp_path: Path) -> None:
    reader = io.BytesIO(tensor_file(1000))
    with pytest.raises(XloomError) as caught:
        copy(reader, tmp_path / "adapter_model.safetensors", None, Budget("x", Limits(size=500)))
    assert caught.value.code == "source_too_large"
    assert len(reader.read()) == 1000  # none of them was read


class _Endless(MemoryFileSystem):
    """Every folder has a folder in it."""

    protocol = "endless"
    cachable = False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        return [{"name": f"{path.rstrip('/')}/d", "size": 0, "type": "directory"}]


def test_a_tree_without_an_end_is_refused(tmp_path: Path) -> None:
    fsspec.register_implementation("endless", _Endless, clobber=True)
    assert refused("endless://x/y", tmp_path / "into", SourceRules()).code == "source_too_large"


def tensor_file(size: int) -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\xff" * 100, "not a safetensors file"),
        (b"", "not a safetensors file"),
        ((8).to_bytes(8, "little") + b"[1, 2]  ", "header can't be read"),
        ((5).to_bytes(8, "little") + b'{"a":', "header can't be read"),
        (tensor_file(100)[:-1], "and it has"),
        (tensor_file(100) + b"x", "and it has"),
    ],
)
def test_weights_that_are_none_are_known_by_their_header(tmp_path: Path, content: bytes, said: str) -> None:
    (folder(tmp_path / "source") / "adapter_model.safetensors").write_bytes(content)
    error = refused(str(tmp_path / "source"), tmp_path / "into", SourceRules())
    assert error.code == "broken_adapter"
    assert said in error.message
    assert str(tmp_path / "source") in error.message


class _Handler(BaseHTTPRequestHandler):
    """A folder at /folder whose weights never end, /pages that never end, /moved that leads elsewhere, and /silent."""

    def do_GET(self) -> None:
        if self.path.startswith("/silent"):
            self.server.released.wait(20)  # type: ignore[attr-defined]
            return
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{self.server.server_address[1]}/folder/")
            self.end_headers()
            return
        self.send_response(200)
        if self.path.startswith("/pages"):
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self._without_end(b"<a " + bytes(2**16))
            return
        if not self.path.endswith(".safetensors"):
            body = b'<a href="/folder/adapter_model.safetensors">weights</a>'
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.end_headers()
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.wfile.write(tensor_file(2**20))
        self._without_end(bytes(2**16))

    def _without_end(self, piece: bytes) -> None:
        with suppress(OSError):
            while not self.server.released.is_set():  # type: ignore[attr-defined]
                self.wfile.write(piece)
                self.server.sent += len(piece)  # type: ignore[attr-defined]

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[str, Any]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.released, server.asked, server.sent = threading.Event(), [], 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def test_a_file_without_an_end_is_read_as_far_as_its_header_says(tmp_path: Path) -> None:
    with serving() as (url, _):
        error = refused(f"{url}/folder", tmp_path / "into", SourceRules((url,)))
    assert (error.code, "more come" in error.message) == ("broken_adapter", True)
    assert (tmp_path / "into" / "adapter_model.safetensors").stat().st_size < 2**22


def test_a_page_without_an_end_is_read_so_far_and_no_further(tmp_path: Path) -> None:
    with serving() as (url, server):
        assert refused(f"{url}/pages", tmp_path / "into", SourceRules((url,))).code == "source_too_large"
        assert server.sent < MOST_PAGE + 2**24  # beside what lies in the kernel's buffers


def test_a_pages_links_are_those_below_it() -> None:
    page = """<a href="?C=N;O=D">Name</a> <a href="../">up</a> <A class=x HREF = 'a.json'> <a href="/f/sub/">
    <a href="http://h/f/b.json"> <a href="http://h.evil/f/c.json"> <a href="sub/../../d.json"> <a href="a.json">"""
    assert links(page, "http://h/f") == ["http://h/f/a.json", "http://h/f/sub/", "http://h/f/b.json"]


@pytest.mark.parametrize("piece", ["<a ", " ", "href ", "href = ", "href='", "href='x"])
def test_links_are_found_in_a_time_that_grows_with_the_page(piece: str) -> None:
    began = time.monotonic()
    links("<a " + piece * (MOST_PAGE // len(piece)), "http://h/f")
    assert time.monotonic() - began < 10


def test_a_source_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with serving() as (url, _):
        began = time.monotonic()
        error = refused(f"{url}/silent", tmp_path / "into", SourceRules((url,), Limits(stall_s=0.5)))
    assert (error.code, error.status) == ("source_too_slow", 504)
    assert time.monotonic() - began < 5


def test_the_inner_network_is_reached_by_name_alone(tmp_path: Path) -> None:
    with serving() as (url, server):
        error = refused(f"{url}/folder", tmp_path / "into", SourceRules(("http://",)))
        assert error.code == "source_unreachable"
        assert "inner network" in error.message
        error = refused(f"{url}/moved", tmp_path / "into", SourceRules((url,)))
        assert "inner network" in error.message
        assert not server.asked


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("10.1.2.3", False), ("169.254.169.254", False), ("::1", False), ("fe80::1%eth0", False),
     ("::ffff:10.0.0.1", False), ("100.64.0.1", False), ("2606:4700::1111", True), ("64:ff9b::a00:1", False),
     ("64:ff9b::808:808", True), ("2002:a00:1::", False), ("224.0.0.1", False)],
)  # fmt: skip
def test_addresses_are_told_apart(address: str, public: bool) -> None:
    assert inner_network._is_public(address) is public
