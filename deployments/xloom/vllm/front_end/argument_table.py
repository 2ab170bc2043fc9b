"""Which options of vLLM 0.32's OpenAI front end `router.front_end_args` may set. Imports nothing of vLLM.

Each was looked up where `build_app` and `init_app_state` read it; the others do nothing here, or have a key of xloom's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from xloom.protocol import XloomError

HONOURED = frozenset(
    """
    chat_template chat_template_content_format trust_request_chat_template default_chat_template_kwargs response_role
    enable_auto_tool_choice exclude_tools_when_tool_choice_none tool_call_parser tool_parser_plugin tool_strict_level
    tool_server return_tokens_as_token_ids sse_keep_alive_interval enable_force_include_usage
    enable_prompt_tokens_details enable_per_request_metrics enable_server_load_tracking
    enable_log_requests enable_log_outputs enable_log_deltas max_log_len log_error_stack
    anthropic_disabled_thinking_effort cohere_format fingerprint_mode fingerprint_value
    allow_credentials allowed_origins allowed_methods allowed_headers middleware
    """.split()
)

_TLS = "xloom's endpoint speaks plain HTTP: let an ingress, a gateway or a proxy in front of it speak TLS."
_ROUTES = "The routes are the same in every deployment: docs/settings.md."
_CURES = {
    "host": "Set router.host.",
    "port": "Set router.port.",
    "api_key": "Set XLOOM_API_KEY, or router.api_key.",
    "model": "Set model.source.",
    "served_model_name": "Set model.served_name.",
    "revision": "Set model.revision.",
    "lora_modules": "List them under adapters.",
    "max_model_len": "Set engine.max_model_len.",
    "reasoning_parser": "Set it in engine.extra_args: engine and front end both need it.",
    "trust_remote_code": "Code from a model's repository is never run.",
    "root_path": "Have the proxy strip the prefix.",
    "uvicorn_log_level": "Set observability.logs.level.",
    "enable_request_id_headers": "Answers always carry X-Request-Id.",
    "tokens_only": _ROUTES,
    "enable_scale_out": _ROUTES,
    "enable_tokenizer_info_endpoint": _ROUTES,
    "disable_fastapi_docs": _ROUTES,
    "enable_offline_docs": _ROUTES,
} | dict.fromkeys(
    ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "enable_ssl_refresh"), _TLS
)


def check_names(given: Iterable[str]) -> None:
    """Raise `XloomError` (unknown_front_end_argument) for the first option that would do nothing."""
    for name in given:
        if name in HONOURED:
            continue
        near = difflib.get_close_matches(name, HONOURED, n=1)
        cure = _CURES.get(name) or (
            f"Did you mean {near[0]}?" if near else "An argument of the engine belongs into engine.extra_args."
        )
        raise XloomError("unknown_front_end_argument", f"router.front_end_args can't set {name!r}.", cure)
