"""A running xloom endpoint, seen from the command line."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xloom.protocol import XloomError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 600.0  # adding an adapter may download it first
_ADMIN = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/xloom/mixtures",
)  # routes for which the API key is not enough


class Endpoint:
    """The HTTP routes the commands use. Every failure is an `XloomError`."""

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._key = key

    def get(self, path: str) -> Any:
        """The JSON answer of a GET."""
        return self._call("GET", path, None, TIMEOUT_S)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer of a POST of JSON: parsed, or text where it is not JSON."""
        return self._call("POST", path, body, LOAD_TIMEOUT_S)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events of a POST of JSON, as they come."""
        with self._open("POST", path, body, LOAD_TIMEOUT_S) as response:
            for line in response:
                kind, _, data = line.decode("utf-8", "replace").strip().partition(":")
                if kind != "data" or data.strip() == "[DONE]":
                    continue
                event = _parse(data.encode())
                if not isinstance(event, dict) or "error" in event:
                    raise _refusal(500, path, data.encode())
                yield event

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        with self._open(method, path, body, timeout) as response:
            return _parse(response.read())

    @contextmanager
    def _open(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> Iterator[Any]:
        headers = {"Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
            with urllib.request.urlopen(request, timeout=timeout) as response:
                yield response
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, path, error.read()) from None
        except (ValueError, http.client.InvalidURL) as error:
            raise XloomError("invalid_url", f"{self.url} is not a URL: {error}.", "Give http://host:port.") from None
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", None) or error
            raise XloomError(
                "endpoint_unreachable",
                f"No answer from {self.url}: {reason}.",
                "Start it with `xloom serve`, or name another with --url.",
                503,
            ) from None


def _parse(content: bytes) -> Any:
    text = content.decode("utf-8", "replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _refusal(status: int, path: str, content: bytes) -> XloomError:
    """An error in OpenAI's shape, or whatever else the endpoint sent."""
    answer = _parse(content)
    error = answer.get("error", answer) if isinstance(answer, dict) else {}
    if not isinstance(error, dict) or not error.get("message"):
        if status == 404:
            cure = "Is this the URL of an xloom endpoint?"
            return XloomError("not_an_xloom_endpoint", f"The endpoint has no {path}.", cure, status)
        return XloomError(
            "endpoint_error", f"The endpoint answered {status} to {path}: {str(answer)[:200]}.", "", status
        )
    code = error.get("code")
    if not isinstance(code, str):
        code = str(error.get("type") or "endpoint_error")
    cure = ""
    if status in (401, 403):
        which = "admin" if path in _ADMIN else "api"
        cure = f"Give the key with --{which}-key or XLOOM_{which.upper()}_KEY."
    return XloomError(code, str(error["message"]), cure, status)
