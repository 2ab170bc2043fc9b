"""Who may call which route."""

from __future__ import annotations

import pytest

from xloom.router.guard import refusal

API, ADMIN = "user-key", "admin-key"


def code(path: str, key: str | None, api: str | None = API, admin: str | None = ADMIN) -> str | None:
    error = refusal(path, f"Bearer {key}" if key else "", api, admin)
    return error.code if error else None


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version"])
def test_probes_need_no_key(path: str) -> None:
    assert code(path, None) is None


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/inference/v1/generate", "/xloom/status"]
)
def test_everything_else_needs_the_api_key(path: str) -> None:
    assert code(path, None) == "invalid_api_key"
    assert code(path, "wrong") == "invalid_api_key"
    assert code(path, API) is None
    assert code(path, ADMIN) is None


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load_lora_adapter/", "//v1/load_lora_adapter"]
)
def test_adapter_routes_need_the_admin_key(path: str) -> None:
    assert code(path, None) == "invalid_api_key"
    assert code(path, API) == "admin_key_required"
    assert code(path, ADMIN) is None
    assert code(path, ADMIN, api=None) is None
    assert code(path, None, api=None) == "invalid_api_key"


def test_without_keys_all_is_open() -> None:
    assert code("/v1/models", None, api=None, admin=None) is None
    assert code("/v1/load_lora_adapter", None, api=None, admin=None) is None


def test_a_key_under_another_scheme_is_no_key() -> None:
    error = refusal("/v1/models", f"Basic {API}", API, None)
    assert error is not None
    assert error.status == 401
