"""What the composition root makes of settings and of what the store already holds."""

from __future__ import annotations

from typing import Any, cast

import pytest

from xloom.adapters.manifest import Entry
from xloom.app import Placing, application, build, for_stored
from xloom.protocol import XloomError
from xloom.settings import Settings

BUNDLE = Entry("blend", "xlora", "1" * 64, 8, ("q_proj",), 1, "./blend")
ADAPTER = Entry("plain", "lora", "2" * 64, 8, ("q_proj",), 1, "./plain")


def settings(**engine: Any) -> Settings:
    return Settings.model_validate({"model": {"source": "./model"}, "engine": engine})


def test_bundles_left_in_the_store_count_as_those_of_the_settings() -> None:
    plain = settings(backend="vllm")
    assert not for_stored(plain, (ADAPTER,)).xlora_enabled
    assert for_stored(plain, (ADAPTER, BUNDLE)).xlora_enabled


@pytest.mark.parametrize(("kind", "found"), [("lora", False), ("xlora", False), ("arrow", True), ("linear", True)])
def test_a_gpu_has_the_kernel_for_gates_of_inputs_where_a_mixture_in_the_store_needs_it(kind: str, found: bool) -> None:
    entry = Entry("any", kind, "3" * 64, 8, ("q_proj",), 1, "./any")
    assert for_stored(settings(backend="vllm"), (entry,)).engine.input_gates is found
    assert for_stored(settings(backend="vllm", input_gates=not found), (entry,)).engine.input_gates is not found


def test_bundles_left_in_the_store_are_refused_by_name_where_mixtures_are_off() -> None:
    with pytest.raises(XloomError, match="'blend'") as caught:
        for_stored(settings(backend="vllm", enable_xlora=False), (ADAPTER, BUNDLE))
    assert caught.value.code == "unsupported_by_backend"


def test_bundles_left_in_the_store_are_refused_by_name_for_a_backend_without_mixtures() -> None:
    pytest.importorskip("mistralrs")
    with pytest.raises(XloomError, match=r"'blend'.*X-LoRA") as caught:
        for_stored(settings(backend="mistralrs"), (BUNDLE,))
    assert caught.value.code == "unsupported_by_backend"


@pytest.mark.parametrize(
    ("sections", "code"),
    [
        ({"router": {"host": "0.0.0.0"}}, "endpoint_without_keys"),
        ({"router": {"front_end_args": {"ssl_certfile": "cert.pem"}}}, "unknown_front_end_argument"),
        ({"store": {"sources": ["local:///models"]}}, "invalid_settings"),
    ],
)
def test_a_cluster_refuses_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], code: str
) -> None:
    monkeypatch.delenv("XLOOM_API_KEY", raising=False)
    with pytest.raises(XloomError) as caught:
        application(sections)
    assert caught.value.code == code


def test_no_deployment_is_given_a_key_and_a_replica_not_even_its_digest() -> None:
    pytest.importorskip("ray")
    router = {"api_key": "the-users-key", "admin_key": "the-admins-key"}
    built: Any = build(Settings.model_validate({"router": router}), cast(Any, None), 8, Placing(1, True))
    given = {}
    while built is not None:
        config = built._bound_deployment._replica_config  # Ray 2.60
        given[built._bound_deployment.name] = config.serialized_init_args + config.serialized_init_kwargs
        built = next((each for each in config.init_args if hasattr(each, "_bound_deployment")), None)
    assert set(given) == {"router", "engine"}
    for arguments in given.values():
        assert b"the-users-key" not in arguments
        assert b"the-admins-key" not in arguments
    assert b"KeyDigest" in given["router"]
    assert b"KeyDigest" not in given["engine"]
