"""Which backend a deployment gets, and what is said when none fits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import FakeBackend
from xloom.engines import registry
from xloom.engines.base import Capabilities, Device, LLMBackend
from xloom.engines.registry import backend_for
from xloom.protocol import XloomError
from xloom.settings import parse_settings


class Paged(FakeBackend):
    @classmethod
    def capabilities(cls) -> Capabilities:
        return Capabilities(True, ("cpu",), ("cpu",), {"cpu": frozenset({("rtn", 4), ("awq", 4)})})


class Small(FakeBackend):
    @classmethod
    def capabilities(cls) -> Capabilities:
        return Capabilities(False, (), ("cpu",), {"cuda": frozenset({("rtn", 2)}), "cpu": frozenset({("rtn", 8)})})


class OnMetal(Paged):
    @classmethod
    def device(cls) -> Device:
        return "metal"


class Absent(FakeBackend):
    @classmethod
    def missing(cls) -> str | None:
        return "pip install absent"


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[LLMBackend]]:
    """The registered backends; a test may take some out."""
    found: dict[str, type[LLMBackend]] = {"vllm": Absent, "paged": Paged, "small": Small}
    monkeypatch.setattr(registry, "names", lambda: sorted(found))
    monkeypatch.setattr(registry, "load_backend", found.__getitem__)
    return found


def chosen(**settings: Any) -> type[LLMBackend]:
    return backend_for(parse_settings(settings))


def refusal(**settings: Any) -> XloomError:
    with pytest.raises(XloomError) as caught:
        chosen(**settings)
    return caught.value


def test_xlora_is_refused_on_a_device_where_the_backend_does_not_serve_it(
    backends: dict[str, type[LLMBackend]],
) -> None:
    backends["metal"] = OnMetal
    del backends["paged"]
    error = refusal(engine={"backend": "metal", "enable_xlora": True})
    assert error.code == "unsupported_by_backend"
    assert "X-LoRA on metal" in error.message
    assert chosen(engine={"backend": "metal"}) is OnMetal


def test_routing_in_one_pass_is_refused_where_the_backend_has_it_not(backends: dict[str, type[LLMBackend]]) -> None:
    single = {"xlora": [{"name": "blend", "source": "./blend", "routing_passes": 1}]}
    error = refusal(engine={"backend": "paged"}, **single)
    assert error.code == "unsupported_by_backend"
    assert "one pass" in error.message
    assert chosen(engine={"backend": "paged"}, xlora=[{"name": "blend", "source": "./blend"}]) is Paged


def test_auto_passes_over_what_is_not_installed(backends: dict[str, type[LLMBackend]]) -> None:
    assert chosen() is Paged


def test_auto_takes_the_first_that_can_do_what_is_asked(backends: dict[str, type[LLMBackend]]) -> None:
    assert chosen(isq={"method": "rtn", "bits": 8}) is Small
    assert chosen(isq={"method": "awq"}) is Paged
    assert chosen(isq={"method": "awq", "bits": "auto"}) is Paged


def test_a_backend_by_name_is_refused_what_it_cannot_do(backends: dict[str, type[LLMBackend]]) -> None:
    error = refusal(engine={"backend": "small"}, xlora=[{"name": "blend", "source": "./blend"}])
    assert error.code == "unsupported_by_backend"
    assert "X-LoRA" in error.message
    assert "paged" in error.cure


def test_a_way_of_quantising_that_works_elsewhere_only_says_where(backends: dict[str, type[LLMBackend]]) -> None:
    error = refusal(engine={"backend": "small"}, isq={"method": "rtn", "bits": 2})  # it could on cuda
    assert error.code == "unsupported_by_backend"
    assert "rtn at 2 bits on cpu" in error.message
    assert "rtn at 8" in error.cure


def test_what_no_backend_can_do_is_refused_with_auto_too(backends: dict[str, type[LLMBackend]]) -> None:
    assert refusal(isq={"method": "gptq", "bits": 2}).code == "unsupported_by_backend"


def test_a_backend_that_is_not_installed_names_the_cure(backends: dict[str, type[LLMBackend]]) -> None:
    error = refusal(engine={"backend": "vllm"})
    assert (error.code, error.cure) == ("backend_missing", "pip install absent")
    backends.clear()
    backends["vllm"] = Absent
    assert "vllm: pip install absent" in refusal().cure


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(XloomError) as caught:
        registry.load_backend("mistal")
    assert caught.value.code == "unknown_backend"
    assert "vllm" in caught.value.cure
