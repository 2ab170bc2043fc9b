"""Why an engine did not start: its processes' own words, with a cure for those that are known."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.config.logging import LoggingConfig

from xloom.vllm.engine.causes import brief, explained, recorded, start_error

POINTER = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
)
CHILD = """
import logging, pickle, sys
from vllm.logger import configure_logging
configure_logging(pickle.loads(bytes.fromhex(sys.argv[1])))
logger = logging.getLogger("vllm.v1.engine.core")
try:
    raise ValueError("no kernel\\nfor this")
except ValueError:
    logger.exception("WorkerProc failed to start.")
try:
    raise Exception("See stack trace for root cause.")
except Exception:
    logger.exception("EngineCore failed to start.")
"""


def test_a_process_brings_its_error_back() -> None:
    config = VllmConfig()
    with recorded(config) as causes:
        logging = pickle.dumps(config.logging_config).hex()
        done = subprocess.run([sys.executable, "-c", CHILD, logging], check=True, timeout=120, capture_output=True)
    error = start_error(POINTER, causes)
    assert error.code == "engine_not_started"
    assert error.message == "The engine did not start: ValueError: no kernel for this"
    assert b"WorkerProc failed to start." in done.stdout + done.stderr


def test_an_operators_logging_is_left_alone() -> None:
    config = VllmConfig(logging_config=LoggingConfig(pylogging_config_file="/theirs.json"))
    with recorded(config):
        assert config.logging_config.pylogging_config_file == "/theirs.json"


def test_a_process_that_was_killed_left_no_word() -> None:
    with recorded(VllmConfig()) as causes:
        pass
    assert start_error(RuntimeError(str(POINTER).replace("1}", "-9}")), causes).code == "out_of_memory"
    assert start_error(POINTER, causes).code == "engine_not_started"


@pytest.mark.parametrize(
    ("kind", "text", "code"),
    [
        ("ValueError", "To serve at least one request ... larger than the available KV cache memory", "too_few_pages"),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", "out_of_memory"),
        ("RuntimeError", "Cannot find any model weights with `/m`", "model_not_loadable"),
        ("SafetensorError", "Error while deserializing header: incomplete metadata", "model_not_loadable"),
        ("ValidationError", "Model architectures ['X'] are not supported for now.", "unsupported_architecture"),
        ("ValueError", "User-specified max_model_len (9) is greater than the derived", "invalid_engine_settings"),
    ],
)
def test_common_causes_have_a_cure(kind: str, text: str, code: str) -> None:
    error = explained(kind, text)
    assert error is not None
    assert error.code == code
    assert error.cure


def test_pydantics_decoration_is_left_out() -> None:
    text = (
        "1 validation error for ModelConfig\n  Value error, it is so. [type=value_error, input_value=1]\n"
        "    For further information visit https://errors.pydantic.dev/2.11/v/value_error"
    )
    assert brief(text) == "it is so"
