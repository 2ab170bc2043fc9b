"""Who may call which route."""

from __future__ import annotations

import pytest

from xloom.router.guard import refusal
from xloom.router.keys import KeyDigest, Keys

API, ADMIN = "user-key", "admin-key"


def digest(key: str | None) -> KeyDigest | None:
    return KeyDigest.of(key) if key else None


def code(
    path: str, key: str | None, api: str | None = API, admin: str | None = ADMIN, *, local: bool = True
) -> str | None:
    error = refusal(path, f"Bearer {key}" if key else "", Keys(digest(api), digest(admin)), local=local)
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


def test_an_api_key_is_no_admin_key() -> None:
    assert code("/v1/load_lora_adapter", API, admin=None) == "admin_key_required"
    assert code("/v1/load_lora_adapter", "wrong", admin=None) == "invalid_api_key"
    assert code("/v1/load_lora_adapter", None, admin=None) == "invalid_api_key"


def test_without_keys_adapters_are_changed_by_this_machines_users_alone() -> None:
    assert code("/v1/models", None, api=None, admin=None, local=False) is None
    assert code("/v1/load_lora_adapter", None, api=None, admin=None, local=False) == "admin_key_required"
    assert code("/v1/load_lora_adapter", None, api=None, admin=None) is None


def test_a_key_under_another_scheme_is_no_key() -> None:
    error = refusal("/v1/models", f"Basic {API}", Keys(digest(API)), local=True)
    assert error is not None
    assert error.status == 401
