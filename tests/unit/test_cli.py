"""The command line, run in this process against a small HTTP server."""

from __future__ import annotations

import json
import socket
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from xloom.cli import main
from xloom.protocol import XloomError
from xloom.settings import Settings

REPLICA = {
    "id": "replica-1",
    "node": "node-a",
    "address": "127.0.0.1:1234",
    "state": "ready",
    "stats": {
        "running": 3,
        "waiting": 2,
        "kv_pages_used": 512,
        "kv_pages_total": 2048,
        "preemptions": 7,
        "adapters": ["code@0123456789abcdef"],
    },
}
ADAPTER = {
    "name": "code",
    "kind": "lora",
    "generation": "0123456789abcdef",
    "rank": 16,
    "targets": ["q_proj"],
    "size": 3 * 1024 * 1024,
    "source": "s3://bucket/code[v2]",
    "replicas": 1,
}
STATUS = {"model": "base", "replicas": [REPLICA], "adapters": [ADAPTER], "router": {"in_flight": 5}}


@dataclass
class FakeEndpoint:
    """Canned answers by method and path; remembers what it was asked."""

    answers: dict[tuple[str, str], tuple[int, Any]]
    url: str = ""
    calls: list[tuple[str, str, Any, str | None]] = field(default_factory=list)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.delenv("XLOOM_ADMIN_KEY", raising=False)
    monkeypatch.delenv("XLOOM_API_KEY", raising=False)
    fake = FakeEndpoint(
        {("GET", "/xloom/status"): (200, STATUS), ("GET", "/xloom/adapters"): (200, {"adapters": [ADAPTER]})}
    )

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fake.calls.append((self.command, self.path, body, self.headers.get("Authorization")))
            status, answer = fake.answers.get((self.command, self.path), (404, "Not Found"))
            content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_status_shows_replicas_and_adapters(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", endpoint.url]) == 0
    shown = capsys.readouterr().out
    for text in (
        "base",
        "5 requests",
        "replica-1",
        "node-a",
        "ready",
        "512/2048",
        "25%",
        "code@01234567",
        "3.0 MiB",
        "1/1",
    ):
        assert text in shown
    assert "s3://bucket/code[v2]" in shown  # not taken for markup


def test_status_json_is_what_the_endpoint_says(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", endpoint.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_status_of_a_deployment_scaled_to_zero(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.answers["GET", "/xloom/status"] = (200, STATUS | {"replicas": [], "adapters": []})
    assert main(["status", "--url", endpoint.url]) == 0
    shown = capsys.readouterr().out
    assert "No replicas." in shown
    assert "No adapters." in shown


def test_an_endpoint_that_is_down_is_named_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["status", "--url", url]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert url in printed.err
    assert "[endpoint_unreachable]" in printed.err
    assert "xloom serve" in printed.err
    assert "Traceback" not in printed.err


def test_json_errors_go_to_stdout_with_code_and_cure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--url", f"http://127.0.0.1:{free_port()}"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "endpoint_unreachable"
    assert error["cure"]


def test_another_server_is_told_from_an_xloom_endpoint(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.answers.clear()
    assert main(["status", "--url", endpoint.url]) == 2
    assert "[not_an_xloom_endpoint]" in capsys.readouterr().err


def test_a_malformed_url_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", "http://127.0.0.1:port"]) == 2
    assert "[invalid_url]" in capsys.readouterr().err


def test_adapters_list_as_table_and_json(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", "--url", endpoint.url]) == 0
    assert "code" in capsys.readouterr().out
    assert main(["adapters", "list", "--url", endpoint.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [ADAPTER]


def test_adapters_add_sends_only_the_options_given(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.answers["POST", "/v1/load_lora_adapter"] = (200, "Success")
    options = [
        "--kind",
        "xlora",
        "--top-k",
        "2",
        "--mixing-mode",
        "gated",
        "--routing-passes",
        "1",
        "--prefill",
        "lagged",
        "--replace",
        "--verify",
        "--admin-key",
        "secret",
    ]
    assert main(["adapters", "add", "blend", "s3://bucket/blend", "--url", endpoint.url, *options]) == 0
    assert "Added blend" in capsys.readouterr().out
    method, path, body, authorization = endpoint.calls[-1]
    assert (method, path, authorization) == ("POST", "/v1/load_lora_adapter", "Bearer secret")
    assert body == {
        "lora_name": "blend",
        "lora_path": "s3://bucket/blend",
        "kind": "xlora",
        "top_k": 2,
        "mixing_mode": "gated",
        "routing_passes": 1,
        "prefill": "lagged",
        "load_inplace": True,
        "verify": True,
    }


def test_adapters_add_makes_a_local_folder_absolute(
    endpoint: FakeEndpoint, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.answers["POST", "/v1/load_lora_adapter"] = (200, "Success")
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["adapters", "add", "code", "./code", "--url", endpoint.url]) == 0
    assert endpoint.calls[-1][2] == {"lora_name": "code", "lora_path": str((tmp_path / "code").resolve())}


MIXED = {"name": "both", "routing": "arrow", "adapters": ["code", "docs"], "rank": 16, "generation": "0123"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--routing", "arrow", "code", "docs"], {"adapters": ["code", "docs"], "routing": "arrow"}),
        (["code", "docs", "--top-k", "1"], {"adapters": ["code", "docs"], "routing": "arrow", "top_k": 1}),
        (["code", "--temperature", "0.5", "docs"], {"adapters": ["code", "docs"], "temperature": 0.5}),
        (["code", "docs", "--routing", "fixed", "--replace"], {"routing": "fixed", "replace": True}),
        (["--weights", "code=0.7", "docs=-.3"], {"routing": "fixed", "weights": {"code": 0.7, "docs": -0.3}}),
        (["docs", "maths", "--weights", "docs=1"], {"adapters": ["docs", "maths"], "weights": {"docs": 1.0}}),
    ],
)
def test_mix_takes_adapters_before_between_and_after_its_options(
    endpoint: FakeEndpoint, words: list[str], expected: dict[str, Any]
) -> None:
    endpoint.answers["POST", "/xloom/mixtures"] = (200, MIXED | {"routing": "fixed"})
    assert main(["mix", "both", *words, "--url", endpoint.url, "--admin-key", "secret"]) == 0
    method, path, body, authorization = endpoint.calls[-1]
    assert (method, path, authorization) == ("POST", "/xloom/mixtures", "Bearer secret")
    assert body == {"name": "both", "adapters": ["code", "docs"], "routing": "arrow"} | body | expected
    assert len(body["adapters"]) == 2


def test_mix_makes_a_local_folder_absolute_and_leaves_a_name_alone(
    endpoint: FakeEndpoint, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.answers["POST", "/xloom/mixtures"] = (200, MIXED | {"routing": "fixed"})
    for name in ("code", "docs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["mix", "both", "code", "./docs", "hf://org/maths", "--url", endpoint.url]) == 0
    assert endpoint.calls[-1][2]["adapters"] == ["code", str(tmp_path / "docs"), "hf://org/maths"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["code"], "two adapters or more"),
        (["code", "docs", "--weights", "code"], "is not ADAPTER=WEIGHT"),
        (["code", "docs", "--remove"], "a name alone"),
    ],
)
def test_mix_says_what_is_wrong_with_its_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["mix", "both", *words])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def completion(**gates: float) -> dict[str, Any]:
    return {"choices": [{"text": "", "mixture": {"name": "both", "routing": "arrow", "gates": gates}}]}


@pytest.mark.parametrize(("gates", "near"), [({"code": 0.52, "docs": 0.48}, True), ({"code": 0.7, "docs": 0.3}, False)])
def test_mix_says_so_where_gates_are_nearly_uniform(
    endpoint: FakeEndpoint, gates: dict[str, float], near: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.answers["POST", "/xloom/mixtures"] = (200, MIXED)
    endpoint.answers["POST", "/v1/completions"] = (200, completion(**gates))
    words = ["mix", "both", "code", "docs", "--url", endpoint.url]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Mixed code, docs as both: arrow, of rank 16." in shown
    assert f"Mean gates over 4 prompts: code {gates['code']:.2f}" in shown
    assert ("nearly the same at every prompt" in shown) is near
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == MIXED | {"gates": [gates] * 4, "near_uniform": near}


@pytest.mark.parametrize("answer", [(200, {"choices": [{"text": ""}]}), (503, "no replica")])
def test_mix_says_nothing_of_gates_that_are_not_told(
    endpoint: FakeEndpoint, answer: tuple[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.answers["POST", "/xloom/mixtures"] = (200, MIXED)
    endpoint.answers["POST", "/v1/completions"] = answer
    assert main(["mix", "both", "code", "docs", "--url", endpoint.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == MIXED


def test_mix_removes_mixtures_and_no_adapters(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.answers["GET", "/xloom/adapters"] = (
        200,
        {"adapters": [ADAPTER, ADAPTER | {"name": "m", "kind": "arrow"}]},
    )
    endpoint.answers["POST", "/v1/unload_lora_adapter"] = (200, "Success")
    assert main(["mix", "--remove", "m", "--url", endpoint.url]) == 0
    assert endpoint.calls[-1][2] == {"lora_name": "m"}
    assert main(["mix", "code", "--remove", "--url", endpoint.url]) == 2
    assert "[wrong_kind]" in capsys.readouterr().err
    assert endpoint.calls[-1][0] == "GET"


def test_the_admin_key_comes_from_the_environment(
    endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLOOM_ADMIN_KEY", "from-environment")
    endpoint.answers["POST", "/v1/unload_lora_adapter"] = (200, "Success")
    assert main(["adapters", "remove", "code", "--url", endpoint.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"message": "Success"}
    assert endpoint.calls[-1][2:] == ({"lora_name": "code"}, "Bearer from-environment")


def test_the_endpoints_own_error_code_reaches_the_user(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"message": "This route needs the admin key.", "type": "permission_error", "code": "admin_key_required"}
    endpoint.answers["POST", "/v1/unload_lora_adapter"] = (403, {"error": error})
    assert main(["adapters", "remove", "code", "--url", endpoint.url]) == 2
    printed = capsys.readouterr().err
    assert "This route needs the admin key. [admin_key_required]" in printed
    assert "--admin-key" in printed


def test_the_key_that_is_asked_for_is_the_one_the_route_needs(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"message": "An API key is needed.", "type": "authentication_error", "code": "invalid_api_key"}
    for method, path, arguments, named in (
        ("GET", "/xloom/status", ["status"], "api"),
        ("GET", "/v1/models", ["generate", "Hello"], "api"),
        ("POST", "/v1/load_lora_adapter", ["adapters", "add", "code", "hf://org/code"], "admin"),
    ):
        endpoint.answers[method, path] = (401, {"error": error})
        assert main([*arguments, "--url", endpoint.url]) == 2
        printed = capsys.readouterr().err
        assert f"--{named}-key or XLOOM_{named.upper()}_KEY" in " ".join(printed.split())
        assert ("--api-key" in printed) != ("--admin-key" in printed)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `serve_forever` is called with; Ray is not started."""
    calls: list[Settings] = []
    app = types.ModuleType("xloom.launch")
    app.serve_forever = calls.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xloom.launch", app)
    return calls


def test_serve_uses_the_sample_and_the_port_given(served: list[Settings]) -> None:
    assert main(["serve", "--port", "8123"]) == 0
    (settings,) = served
    assert settings.router.port == 8123
    assert settings.model.served_name == "base"
    assert [bundle.name for bundle in settings.xlora] == ["blend"]


def test_serve_keeps_the_port_of_the_settings(served: list[Settings], tmp_path: Any) -> None:
    (tmp_path / "own.yaml").write_text("router: {port: 9000}\n")
    assert main(["serve", str(tmp_path / "own.yaml")]) == 0
    assert served[0].router.port == 9000


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_serve_refuses_what_is_no_port(served: list[Settings], port: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", f"--port={port}"])
    assert stopped.value.code == 2
    assert served == []


def test_serve_names_a_wrong_key(served: list[Settings], tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.yaml").write_text("engine: {max_model_length: 10}\n")
    assert main(["serve", str(tmp_path / "wrong.yaml")]) == 2
    assert "did you mean 'max_model_len'?" in capsys.readouterr().err
    assert served == []


def test_serve_ends_with_130_on_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(settings: Settings) -> None:
        raise KeyboardInterrupt

    app = types.ModuleType("xloom.launch")
    app.serve_forever = interrupted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xloom.launch", app)
    assert main(["serve"]) == 130
    assert capsys.readouterr().err == ""


def test_serve_shows_an_errors_code_and_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(settings: Settings) -> None:
        raise XloomError("port_in_use", "Port 8000 is taken.", "Choose another with --port.")

    app = types.ModuleType("xloom.launch")
    app.serve_forever = fails  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xloom.launch", app)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == "Port 8000 is taken. [port_in_use]\nChoose another with --port.\n"


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["status"],
        ["adapters"],
        ["adapters", "list"],
        ["adapters", "add"],
        ["adapters", "remove"],
        ["mix"],
        ["doctor"],
        ["check"],
    ],
)
def test_each_command_has_help_with_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert f"example: xloom {' '.join(command)}" in capsys.readouterr().out


def test_the_command_line_loads_neither_ray_nor_vllm() -> None:
    import subprocess

    code = "import sys, xloom.cli; print([name for name in ('ray', 'vllm', 'torch') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
