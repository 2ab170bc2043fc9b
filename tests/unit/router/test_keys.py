"""Keys on their way to where they are needed, and endpoints that lack them."""

from __future__ import annotations

import os
import pickle

import pytest

from xloom.protocol import XloomError
from xloom.router.exposure import check_exposure, is_loopback
from xloom.router.keys import Keys, without_keys
from xloom.settings import RouterSettings, forget_keys, parse_settings


def test_what_deployments_are_given_holds_no_key() -> None:
    settings = parse_settings({"router": {"api_key": "the-users-key", "admin_key": "the-admins-key"}})
    given = pickle.dumps((without_keys(settings), Keys.of(settings.router)))
    assert b"the-users-key" not in given
    assert b"the-admins-key" not in given
    again: Keys = pickle.loads(given)[1]
    assert again.api is not None
    assert again.api.matches("the-users-key")
    assert not again.api.matches("the-admins-key")


def test_two_digests_of_a_key_have_nothing_in_common() -> None:
    router = RouterSettings.model_validate({"api_key": "k", "admin_key": "k"})
    keys = Keys.of(router)
    assert keys.api != keys.admin
    assert Keys.of(RouterSettings()) == Keys()


def test_a_process_can_forget_the_keys_it_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLOOM_API_KEY", "user")
    monkeypatch.setenv("XLOOM_ADMIN_KEY", "admin")
    forget_keys()
    assert not {"XLOOM_API_KEY", "XLOOM_ADMIN_KEY"} & set(os.environ)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.5", "localhost.example.com", "")],
)
def test_loopback_is_told_from_what_others_reach(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("router", "code"),
    [
        ({"host": "0.0.0.0"}, "endpoint_without_keys"),
        ({"host": "0.0.0.0", "admin_key": "a"}, "endpoint_without_keys"),
        ({"host": "0.0.0.0", "api_key": "k"}, None),
        ({"host": "0.0.0.0", "allow_anonymous": True}, None),
        ({}, None),
        ({"api_key": "k", "admin_key": "k"}, "one_key_for_both"),
    ],
)
def test_an_open_endpoint_must_be_meant(router: dict[str, object], code: str | None) -> None:
    settings = RouterSettings.model_validate(router)
    if code is None:
        check_exposure(settings)
        return
    with pytest.raises(XloomError) as caught:
        check_exposure(settings)
    assert caught.value.code == code


@pytest.mark.parametrize("data", [{"router": {"api_key": ""}}, {"engine": {"extra_args": {"hf_token": "hf_secret"}}}])
def test_an_empty_key_and_a_token_among_the_arguments_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(XloomError) as caught:
        parse_settings(data)
    assert caught.value.code == "invalid_settings"
    assert "hf_secret" not in caught.value.message
