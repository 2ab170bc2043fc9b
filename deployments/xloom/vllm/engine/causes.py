"""Why an engine did not start: what its processes log as they fail, brought back to whoever started them."""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.protocol import XloomError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FILE_VARIABLE = "XLOOM_START_CAUSES"  # from the process that starts an engine to the engine's own
LONGEST = 1500  # characters of a cause that are shown
# A process that says so has only seen another fail: `MultiprocExecutor.wait_for_ready`, `CoreEngineProcManager`.
_ELSEWHERE = ("See stack trace for root cause", "See root cause above", "Executor failed")


class CauseHandler(logging.Handler):
    """Appends each exception that is logged as an error to a file, one JSON object a line."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._file = os.environ.get(FILE_VARIABLE, os.devnull)

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        line = json.dumps({"kind": type(error).__name__, "text": str(error)}) + "\n"
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            self.handleError(record)


@dataclass(frozen=True)
class Cause:
    """An exception in one of an engine's processes."""

    kind: str
    text: str


@dataclass(frozen=True)
class Causes:
    """The exceptions of one start."""

    file: Path

    def first(self) -> Cause | None:
        """The one that the others followed from."""
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        found = [Cause(**json.loads(line)) for line in lines]
        own = [cause for cause in found if not any(phrase in cause.text for phrase in _ELSEWHERE)]
        return own[0] if own else None


@contextmanager
def recorded(config: VllmConfig) -> Iterator[Causes]:
    """While an engine of this configuration starts, have its processes write down why they fail.

    Each of them applies `VllmConfig.logging_config` (`vllm.logger.configure_logging`, 0.32): here vLLM's own with a
    handler more. An operator's is left alone.
    """
    folder = _folder()
    causes = Causes(folder / f"{uuid.uuid4().hex}.causes")
    theirs = config.logging_config
    if theirs.configure_logging and theirs.pylogging_config_file is None:
        file = folder / "logging.json"
        file.write_text(json.dumps(_logging_config(theirs.log_level)), encoding="utf-8")
        config.logging_config = dataclasses.replace(theirs, pylogging_config_file=str(file))
    os.environ[FILE_VARIABLE] = str(causes.file)
    try:
        yield causes
    finally:
        del os.environ[FILE_VARIABLE]


@cache
def _folder() -> Path:
    """It lasts as long as this process: what an engine starts later reads the configuration again."""
    folder = tempfile.mkdtemp(prefix="xloom-start-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _logging_config(level: str) -> dict[str, Any]:
    from vllm import envs
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    config: dict[str, Any] = deepcopy(DEFAULT_LOGGING_CONFIG)
    config["handlers"]["vllm"]["level"] = config["loggers"]["vllm"]["level"] = level
    config["handlers"]["vllm"]["stream"] = envs.VLLM_LOGGING_STREAM  # it may have changed since vLLM was imported
    for formatter in config["formatters"].values():
        formatter["log_level"] = level
    config["handlers"]["xloom"] = {"()": f"{CauseHandler.__module__}.{CauseHandler.__name__}"}
    config["loggers"]["vllm"]["handlers"] = [*config["loggers"]["vllm"]["handlers"], "xloom"]
    return config


# What an error says -> our code, and what to do. The phrases are vLLM's (0.32), torch's and safetensors'.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"larger than the available KV cache memory|No available memory for the cache blocks",
        "too_few_pages",
        "Lower engine.max_model_len, or raise engine.paged_attention.max_blocks (on a GPU: gpu_memory_fraction).",
    ),
    (
        r"out of memory|Free memory on device|can't allocate memory|Cannot allocate memory|not enough memory"
        r"|^MemoryError|Available memory on node",
        "out_of_memory",
        "Lower engine.paged_attention (max_blocks; on a GPU gpu_memory_fraction) or engine.max_num_seqs, quantise with "
        "isq, take a smaller model, or free memory.",
    ),
    (
        r"Cannot find any model weights|not initialized from|deserializing header|HeaderTooLarge|InvalidHeader|"
        r"MetadataIncompleteBuffer|IncompleteMetadata",
        "model_not_loadable",
        "The model's weights are missing or damaged: download it again, as safetensors.",
    ),
    (
        r"are not supported for now|does not recognize this architecture|no module or parameter named",
        "unsupported_architecture",
        "Use a model that vLLM 0.32 supports: https://docs.vllm.ai/en/latest/models/supported_models.html",
    ),
    (
        r"max_model_len.{0,80}is greater than the derived|User-specified max_model_len",
        "invalid_engine_settings",
        "Lower engine.max_model_len to what the model was made for.",
    ),
    (
        r"CUDA driver|No CUDA GPUs|no kernel image|Failed to infer device type",
        "device_missing",
        "See that the driver fits this torch: nvidia-smi, and `xloom doctor`.",
    ),
)


def explained(kind: str, text: str) -> XloomError | None:
    """What is known of an error: a code of ours and a cure with the error's own words; None for any other."""
    for pattern, code, cure in _KNOWN:
        if re.search(pattern, f"{kind}: {text}" if kind == "MemoryError" else text, re.IGNORECASE):
            return XloomError(code, f"The engine did not start: {brief(text) or kind}.", cure, 500)
    return None


def start_error(error: BaseException, causes: Causes) -> XloomError:
    """The error of a start that failed: the first process's own where it was written down.

    One that left no word was killed: its exit code is in what vLLM says, which then is all there is.
    """
    first = causes.first()
    if first is None:
        first = Cause(type(error).__name__, str(error))
        if re.search(r"proc\(s\): \{[^}]*: -9\b", first.text):
            cure = "Free memory, take a smaller model, or lower engine.paged_attention.max_blocks."
            message = "The engine did not start: its process was killed (signal 9), mostly for want of memory."
            return XloomError("out_of_memory", message, cure, 500)
    known = explained(first.kind, first.text)
    if known is not None:
        return known
    message = f"The engine did not start: {first.kind}: {brief(first.text)}"
    return XloomError("engine_not_started", message, "See the replica's log for the whole of it.", 500)


def brief(text: str) -> str:
    """An error's words on one line, without the pointers of pydantic and vLLM to pages and arguments."""
    text = re.sub(r"\[type=[^\]]*\]|For further information visit \S+|See https://\S+ for more details\.?", "", text)
    text = re.sub(r"^\d+ validation errors? for \w+", "", text.strip())
    line = " ".join(text.split()).removeprefix("Value error, ").rstrip(". ")
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."
