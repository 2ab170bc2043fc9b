"""Bad input gets a clear error in OpenAI's shape with a stable code, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from ...models import tiny_adapter, tiny_bundle
from ..served import ADMIN_KEY, API_KEY, Served
from ..weights import MAX_LENGTH, Oracle, Weights

PROMPT = tuple(range(60, 100))
Make = Callable[[Path, Weights], Path]


def lasting(server: Served) -> dict[str, Any]:
    """The status without what changes by itself."""
    status = server.status()
    return {
        "model": status["model"],
        "adapters": status["adapters"],
        "replicas": [
            (replica["id"], replica["pid"], replica["state"], replica["stats"]["adapters"])
            for replica in status["replicas"]
        ],
    }


@pytest.fixture(autouse=True)
def _nothing_changes(server: Served, oracle: Oracle) -> Iterator[None]:
    """After the error a good request works, and what is served is what was."""
    before, names = lasting(server), server.names()
    yield
    assert server.greedy("blend", list(PROMPT), 8) == oracle("blend", PROMPT, 8)
    server.wait_idle()
    assert lasting(server) == before
    assert server.names() == names


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, after a look at its shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["code"], str)
    assert "Traceback" not in error["message"]
    return error


# Requests.


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(server: Served, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        server.openai.chat.completions.create(
            model="nobody", messages=[{"role": "user", "content": "Hello"}], stream=stream
        )
    assert raised.value.code == "model_not_found"
    assert "nobody" in raised.value.message
    error_of(raised.value.response, 404)


@pytest.mark.parametrize("name", ["base", "alpha", "blend"])
def test_a_prompt_that_is_too_long_is_refused(server: Served, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.openai.completions.create(model=name, prompt=[65] * (MAX_LENGTH + 1), max_tokens=4)
    assert raised.value.code == "context_length_exceeded"
    assert str(MAX_LENGTH) in raised.value.message


def test_a_chat_that_is_too_long_is_refused(server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.openai.chat.completions.create(
            model="blend", messages=[{"role": "user", "content": "long " * MAX_LENGTH}], max_tokens=4
        )
    assert raised.value.code == "context_length_exceeded"


def test_an_answer_ends_where_the_context_does(server: Served) -> None:
    assert len(server.greedy("blend", [65] * (MAX_LENGTH - 2), 100)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"temperature": -0.5},
        {"top_p": 2.0},
        {"n": 0},
        {"logprobs": 10_000},
        {"prompt": []},
        {"prompt": [65, 1_000_000]},
        {"prompt": [65, -4]},
        {"extra_body": {"structured_outputs": {"regex": "("}}},
    ],
    ids=lambda options: json.dumps(options),
)
def test_parameters_out_of_range_are_refused(server: Served, options: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "blend", "prompt": list(PROMPT), "max_tokens": 4} | options
    with pytest.raises(openai.BadRequestError) as raised:
        server.openai.completions.create(**asked)
    error_of(raised.value.response, 400)


def test_json_that_is_none_is_refused(server: Served) -> None:
    answer = server.http.post(
        "/v1/completions", content=b'{"model": "base", "prompt": ', headers={"Content-Type": "application/json"}
    )
    assert error_of(answer, 400)["code"] == "invalid_request"


def test_a_body_without_a_prompt_is_refused(server: Served) -> None:
    answer = server.http.post("/v1/chat/completions", json={"model": "base"})
    assert error_of(answer, 400)["code"] == "invalid_request"


def test_an_unknown_route_is_not_found(server: Served) -> None:
    assert error_of(server.http.get("/v1/nowhere"), 404)["code"] == "not_found"


def test_a_method_a_route_has_not_is_refused(server: Served) -> None:
    assert error_of(server.http.delete("/v1/models"), 405)["code"] == "method_not_allowed"


# Keys.


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", "Bearer ключ", f"Basic {API_KEY}", API_KEY])
def test_a_request_without_a_valid_key_is_refused(server: Served, value: str) -> None:
    headers = {"Authorization": value.encode()}
    answer = server.http.get("/v1/models", headers=headers)
    assert error_of(answer, 401)["code"] == "invalid_api_key"


def test_the_official_client_with_a_wrong_key_raises_its_own_error(server: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        server.openai.with_options(api_key="wrong").models.list()
    assert raised.value.code == "invalid_api_key"


@pytest.mark.parametrize("route", ["load_lora_adapter", "unload_lora_adapter"])
@pytest.mark.parametrize(
    ("key", "status", "code"),
    [(None, 401, "invalid_api_key"), ("wrong", 401, "invalid_api_key"), (API_KEY, 403, "admin_key_required")],
    ids=["none", "wrong", "user"],
)
def test_adapter_routes_need_the_admin_key(
    server: Served, weights: Weights, route: str, key: str | None, status: int, code: str
) -> None:
    body = {"lora_name": "alpha"} | ({"lora_path": str(weights.adapters["beta"])} if route.startswith("load") else {})
    assert error_of(server.admin(route, body, key), status)["code"] == code


# Adapters.


def pickled(folder: Path, weights: Weights) -> Path:
    adapter = tiny_adapter(folder / "pickled", weights.base)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    return adapter


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def of_another_width(folder: Path, weights: Weights) -> Path:
    def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: t[:, :-8].contiguous() if ".lora_A." in key else t for key, t in tensors.items()}

    return rewritten(tiny_adapter(folder / "narrow", weights.base), narrow)


def of_another_base(folder: Path, weights: Weights) -> Path:
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.replace(".layers.1.", ".layers.27."): tensor for key, tensor in tensors.items()}

    return rewritten(tiny_adapter(folder / "other", weights.base), rename)


def above_the_stores_rank(folder: Path, weights: Weights) -> Path:
    return tiny_adapter(folder / "wide", weights.base, rank=257, targets=("q_proj",))


def above_the_engines_rank(folder: Path, weights: Weights) -> Path:
    return tiny_adapter(folder / "wider", weights.base, rank=72, targets=("q_proj",))


def without_weights(folder: Path, weights: Weights) -> Path:
    adapter = tiny_adapter(folder / "empty", weights.base)
    (adapter / "adapter_model.safetensors").unlink()
    return adapter


def cut_short(folder: Path, weights: Weights) -> Path:
    adapter = tiny_adapter(folder / "short", weights.base)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return adapter


def with_odd_configuration(folder: Path, weights: Weights) -> Path:
    adapter = tiny_adapter(folder / "odd", weights.base)
    (adapter / "adapter_config.json").write_text("{")
    return adapter


def missing(folder: Path, weights: Weights) -> Path:
    return folder / "nowhere"


def with_an_empty_classifier(folder: Path, weights: Weights) -> Path:
    """As PEFT 0.20 and later save an X-LoRA model."""
    bundle = tiny_bundle(folder / "bundle", weights.base)
    save_file({}, bundle / "adapter_model.safetensors", metadata={"format": "pt"})
    return bundle


def with_a_missing_adapter(folder: Path, weights: Weights) -> Path:
    bundle = tiny_bundle(folder / "gap", weights.base)
    shutil.rmtree(bundle / "1")
    return bundle


def with_a_classifier_of_another_width(folder: Path, weights: Weights) -> Path:
    def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: t[:, :-8].contiguous() if t.dim() == 2 else t for key, t in tensors.items()}

    return rewritten(tiny_bundle(folder / "bundle", weights.base), narrow)


@pytest.mark.parametrize(
    ("make", "status", "code"),
    [
        (pickled, 400, "pickle_refused"),
        (of_another_width, 400, "wrong_shape"),
        (of_another_base, 400, "wrong_base"),
        (above_the_stores_rank, 400, "rank_too_large"),
        (above_the_engines_rank, 400, "rank_too_large"),
        (without_weights, 400, "broken_adapter"),
        (cut_short, 400, "broken_adapter"),
        (with_odd_configuration, 400, "broken_adapter"),
        (missing, 404, "source_not_found"),
        (with_an_empty_classifier, 400, "broken_bundle"),
        (with_a_missing_adapter, 400, "broken_bundle"),
        (with_a_classifier_of_another_width, 400, "broken_bundle"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_malformed_adapter_is_refused(
    server: Served, weights: Weights, tmp_path: Path, make: Make, status: int, code: str
) -> None:
    answer = server.load("malformed", make(tmp_path, weights))
    assert error_of(answer, status)["code"] == code
    assert "malformed" not in server.names()


def test_a_refused_replacement_leaves_the_old_content_in_force(
    server: Served, weights: Weights, oracle: Oracle, tmp_path: Path
) -> None:
    answer = server.load("alpha", of_another_width(tmp_path, weights), load_inplace=True)
    assert error_of(answer, 400)["code"] == "wrong_shape"
    assert server.greedy("alpha", list(PROMPT), 8) == oracle("alpha", PROMPT, 8)


def test_a_replacement_the_engines_can_not_hold_leaves_the_old_content_in_force(
    server: Served, weights: Weights, oracle: Oracle, tmp_path: Path
) -> None:
    answer = server.load("alpha", above_the_engines_rank(tmp_path, weights), load_inplace=True)
    assert error_of(answer, 400)["code"] == "rank_too_large"
    assert server.greedy("alpha", list(PROMPT), 8) == oracle("alpha", PROMPT, 8)


@pytest.mark.parametrize("name", ["../x", "a/../b", "/a", "a/b/c", "..", ".hidden", "a\\b", "", "a b", "x" * 65, "a\n"])
def test_a_name_with_path_parts_is_refused(server: Served, weights: Weights, name: str) -> None:
    answer = server.load(name, weights.adapters["beta"])
    assert error_of(answer, 400)["code"] == "invalid_adapter_name"


def test_the_base_models_name_is_taken(server: Served, weights: Weights) -> None:
    assert error_of(server.load("base", weights.adapters["beta"]), 409)["code"] == "name_reserved"


def test_other_content_under_a_name_that_is_taken_is_refused(server: Served, weights: Weights) -> None:
    assert error_of(server.load("alpha", weights.adapters["beta"]), 409)["code"] == "adapter_exists"


def test_removing_what_is_not_there_is_not_found(server: Served) -> None:
    assert error_of(server.unload("nobody"), 404)["code"] == "adapter_not_found"


@pytest.mark.parametrize(
    "body",
    [{"lora_name": "gamma"}, {"lora_name": "gamma", "lora_path": 7}, {"lora_name": "gamma", "lora_paht": "/x"}, []],
    ids=json.dumps,
)
def test_a_wrong_body_of_an_adapter_route_is_refused(server: Served, body: Any) -> None:
    assert error_of(server.admin("load_lora_adapter", body), 400)["code"] == "invalid_request"


def test_overrides_on_a_plain_adapter_are_refused(server: Served, weights: Weights) -> None:
    answer = server.load("gamma", weights.adapters["beta"], top_k=1)
    assert error_of(answer, 400)["code"] == "invalid_override"


def test_the_command_line_says_what_was_wrong(server: Served, weights: Weights, tmp_path: Path) -> None:
    done = server.command("adapters", "add", "gamma", str(of_another_base(tmp_path, weights)), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "wrong_base"
    refused = server.command("adapters", "remove", "alpha", "--admin-key", API_KEY, "--json")
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["error"]["code"] == "admin_key_required"
    assert ADMIN_KEY not in done.stdout + refused.stdout
