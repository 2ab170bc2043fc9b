"""What an installation is made of."""

from __future__ import annotations

from benchmarks.install_size import closure, installed_bytes, sizes


def test_what_a_requirement_requires_is_counted_once() -> None:
    found = closure(["pydantic", "pydantic"])
    assert {"pydantic", "pydantic-core", "typing-extensions"} <= found
    assert "torch" not in found


def test_what_is_not_installed_is_left_out() -> None:
    assert closure(["no-such-distribution"]) == set()


def test_a_backend_is_larger_than_the_core() -> None:
    found = sizes()
    assert 0 < found["core"][1] < found["transformers"][1]
    assert installed_bytes("msgspec") > 10_000
