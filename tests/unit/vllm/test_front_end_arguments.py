"""Options of vLLM's front end: each is honoured or refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from xloom.protocol import XloomError
from xloom.settings import Settings, parse_settings
from xloom.vllm.front_end.argument_table import _CURES, HONOURED, check_names

OWN = {"enable_log_requests"}  # one of the engine's arguments, which the front end reads


def settings(**arguments: object) -> Settings:
    return parse_settings({"router": {"front_end_args": arguments}})


def refusal(**arguments: object) -> XloomError:
    with pytest.raises(XloomError) as caught:
        check_names(arguments)
    assert caught.value.code == "unknown_front_end_argument"
    return caught.value


def test_what_would_do_nothing_is_refused_with_what_to_do() -> None:
    assert "TLS" in refusal(ssl_certfile="cert.pem").cure
    assert "never run" in refusal(trust_remote_code=True).cure
    assert "router.api_key" in refusal(api_key=["k"]).cure
    assert "engine.extra_args" in refusal(max_num_queued_reqs=4).cure
    assert "chat_template" in refusal(chat_templat="x").cure
    check_names(["chat_template", "tool_call_parser"])


def test_vllm_reads_each_that_is_honoured_and_knows_each_that_is_refused_by_name() -> None:
    cli_args = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert {field.name for field in dataclasses.fields(cli_args.FrontendArgs)} >= HONOURED - OWN
    known = vars(cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args([]))
    assert set(_CURES) <= set(known)
    entrypoints = Path(cli_args.__file__).parents[1]
    folders = ("launchers/app.py", "launchers/api_server/app_state.py", "launchers/cli_args.py", "generate", "serve",
               "mcp", "openai/chat_completion", "openai/completion")  # fmt: skip
    files = [file for each in folders for file in [*(entrypoints / each).rglob("*.py"), entrypoints / each]]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    read = set(re.findall(r"\bargs\.(\w+)", text)) | set(re.findall(r'args, "(\w+)"', text))
    assert HONOURED - {"tool_parser_plugin"} <= read  # the plugin is imported by `front_end_arguments`


@pytest.mark.parametrize(
    "arguments",
    [{"chat_template_content_format": "nope"}, {"enable_auto_tool_choice": True}, {"enable_log_requests": "perhaps"},
     {"middleware": "one"}, {"enable_log_outputs": True}],
)  # fmt: skip
def test_a_value_that_vllm_refuses_is_refused(arguments: dict[str, object]) -> None:
    pytest.importorskip("vllm")
    from xloom.vllm.front_end.app import front_end_arguments

    with pytest.raises(XloomError) as caught:
        front_end_arguments(settings(**arguments))
    assert caught.value.code == "invalid_settings"


def test_values_reach_vllms_own_arguments() -> None:
    pytest.importorskip("vllm")
    from xloom.vllm.front_end.app import front_end_arguments

    args = front_end_arguments(settings(chat_template_content_format="string", enable_log_requests=True))
    assert (args.chat_template_content_format, args.enable_log_requests) == ("string", True)


def test_the_engines_remote_code_setting_does_not_reach_the_front_end() -> None:
    pytest.importorskip("vllm")
    from xloom.vllm.front_end.engine_client import engine_args

    given = parse_settings({"engine": {"extra_args": {"trust_remote_code": True, "reasoning_parser": "qwen3"}}})
    assert engine_args(given)["trust_remote_code"] is False
    assert engine_args(given)["reasoning_parser"] == "qwen3"
