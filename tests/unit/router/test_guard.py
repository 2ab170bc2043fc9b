"""Who may call which route: by the route that would take the request, whatever its path looks like."""

from __future__ import annotations

from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from xloom.router.errors import CodedErrors
from xloom.router.guard import Guard, refusal
from xloom.router.keys import KeyDigest, Keys
from xloom.router.routes import ROUTES, Access, access, is_open, keep_listed

API, ADMIN = "user-key", "admin-key"


def digest(key: str | None) -> KeyDigest | None:
    return KeyDigest.of(key) if key else None


def code(
    wanted: Access, key: str | None, api: str | None = API, admin: str | None = ADMIN, *, local: bool = True
) -> str | None:
    error = refusal(wanted, f"Bearer {key}" if key else "", Keys(digest(api), digest(admin)), local=local)
    return error.code if error else None


def test_probes_need_no_key() -> None:
    assert code(Access.OPEN, None) is None


def test_everything_else_needs_the_api_key() -> None:
    assert code(Access.USER, None) == "invalid_api_key"
    assert code(Access.USER, "wrong") == "invalid_api_key"
    assert code(Access.USER, API) is None
    assert code(Access.USER, ADMIN) is None


def test_adapter_routes_need_the_admin_key() -> None:
    assert code(Access.ADMIN, None) == "invalid_api_key"
    assert code(Access.ADMIN, API) == "admin_key_required"
    assert code(Access.ADMIN, ADMIN) is None
    assert code(Access.ADMIN, ADMIN, api=None) is None
    assert code(Access.ADMIN, None, api=None) == "invalid_api_key"


def test_an_api_key_is_no_admin_key() -> None:
    assert code(Access.ADMIN, API, admin=None) == "admin_key_required"
    assert code(Access.ADMIN, "wrong", admin=None) == "invalid_api_key"
    assert code(Access.ADMIN, None, admin=None) == "invalid_api_key"


def test_without_keys_adapters_are_changed_by_this_machines_users_alone() -> None:
    assert code(Access.USER, None, api=None, admin=None, local=False) is None
    assert code(Access.ADMIN, None, api=None, admin=None, local=False) == "admin_key_required"
    assert code(Access.ADMIN, None, api=None, admin=None) is None


def test_a_key_under_another_scheme_is_no_key() -> None:
    error = refusal(Access.USER, f"Basic {API}", Keys(digest(API)), local=True)
    assert error is not None
    assert error.status == 401


def test_probes_are_told_by_their_paths_in_logs() -> None:
    assert [is_open(path) for path in ("/health", "/ready/", "//metrics", "/v1/models")] == [True, True, True, False]


# The routes of an application.


async def handler() -> str:
    return "done"


handler.__module__ = "xloom.router.http"


async def stranger() -> str:
    return "a stranger's"


def client(root_path: str = "", keys: Keys | None = None, host: str = "router") -> httpx.AsyncClient:
    """An application with routes of its own, of vLLM's and of nobody's, behind the guard."""
    app = FastAPI(root_path=root_path)
    app.add_api_route("/v1/load_lora_adapter", stranger, methods=["POST"])
    for path in ("/adapters", "/collective_rpc", "/scale_elastic_ep", "/v1/load_lora_adapter", "/v1/completions"):
        app.add_api_route(path, handler, methods=["POST"])
    app.add_api_route("/health", handler, methods=["GET"])
    app.add_api_route("/v1/responses/{response_id}", handler, methods=["GET"])
    keep_listed(app)
    keys = keys or Keys(digest(API), digest(ADMIN))
    guarded: Any = CodedErrors(Guard(app, partial(access, app), keys, local=True))
    return httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url=f"http://{host}")


PATHS = [
    "/v1/load_lora_adapter",
    "/v1/load_lora_adapter%0A",
    "/v1/load%5Flora_adapter",
    "/v1/load_lora_adapter/",
    "//v1/load_lora_adapter",
    "/v1/../v1/load_lora_adapter",
    "/V1/LOAD_LORA_ADAPTER",
    "/root/v1/load_lora_adapter",
    "/root/v1/load_lora_adapter%0A",
]


@pytest.mark.parametrize("root_path", ["", "/root"])
@pytest.mark.parametrize("path", PATHS)
async def test_no_spelling_of_an_adapter_route_gets_past_the_admin_key(root_path: str, path: str) -> None:
    async with client(root_path) as http:
        for key in (None, "wrong", API):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            answer = await http.post(path, headers=headers)
            assert answer.status_code in ((401,) if key != API else (307, 403, 404)), (key, answer.text)
        answer = await http.post(path, headers={"Authorization": f"Bearer {ADMIN}"})
        assert (answer.status_code, answer.text) == (200, '"done"') or answer.status_code in (307, 404)


@pytest.mark.parametrize("path", ["/adapters", "/collective_rpc", "/scale_elastic_ep", "/openapi.json", "/docs"])
async def test_what_is_not_listed_is_not_served(path: str) -> None:
    async with client() as http:
        answer = await http.post(path, headers={"Authorization": f"Bearer {ADMIN}"})
        assert answer.status_code == 404


async def test_routes_ask_for_what_the_list_says() -> None:
    async with client() as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.post("/v1/completions")).status_code == 401
        assert (await http.get("/v1/responses/resp_1")).status_code == 401
        assert (await http.get("/v1/load_lora_adapter")).status_code == 401  # another method of it
        assert (await http.post("/v1/completions", headers={"x-api-key": API})).status_code == 200
    assert ROUTES["/v1/unload_lora_adapter"] is Access.ADMIN


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [("127.0.0.1:8000", None, 200), ("[::1]:8000", None, 200), ("localhost", "http://localhost", 200),
     ("127.0.0.1:8000", "https://page.example", 403), ("127.0.0.1:8000", "null", 403),
     ("127.0.0.1:8000", "http://127.0.0.1:3000", 403), ("page.example", None, 403),
     ("page.example", "http://page.example", 403)],
)  # fmt: skip
async def test_without_keys_no_web_page_changes_adapters(host: str, origin: str | None, status: int) -> None:
    headers = {"Origin": origin} if origin else {}
    async with client(keys=Keys(), host=host) as http:
        assert (await http.post("/v1/load_lora_adapter", headers=headers)).status_code == status
        assert (await http.post("/v1/completions", headers=headers)).status_code == 200
