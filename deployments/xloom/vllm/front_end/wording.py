"""vLLM's messages in a deployment's words: what it calls a flag of its command line is a key of the settings.

Relies on vLLM 0.32: `vllm.entrypoints.launchers.cli_args.FrontendArgs` and `vllm.engine.arg_utils.AsyncEngineArgs`,
whose fields are named as the flags.
"""

from __future__ import annotations

import dataclasses
import re

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs

_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])")
_OURS = {"model": "model.source", "max-model-len": "engine.max_model_len", "dtype": "engine.dtype"}
_FRONT_END, _ENGINE = ({field.name for field in dataclasses.fields(kind)} for kind in (FrontendArgs, AsyncEngineArgs))


def in_settings(message: str) -> str:
    """The message with `router.front_end_args.…` or `engine.extra_args.…` for each flag that has such a key."""
    return _FLAG.sub(_setting, message) if "--" in message else message


def _setting(found: re.Match[str]) -> str:
    name = found[1].replace("-", "_")
    if found[1] in _OURS:
        return _OURS[found[1]]
    if name in _FRONT_END:
        return f"router.front_end_args.{name}"
    return f"engine.extra_args.{name}" if name in _ENGINE else found[0]
