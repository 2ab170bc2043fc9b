"""Where llmcompressor lives: a folder of its own, put in front of the environment's packages for one child process.

It needs a newer compressed-tensors than vLLM 0.32 pins, so this process never imports it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from xloom.protocol import XloomError

FOLDER = Path("share") / "xloom" / "isq"  # below the environment


def overlay() -> Path:
    """The folder. Raises `XloomError` (isq_missing)."""
    folder = Path(sys.prefix) / FOLDER
    if not (folder / "llmcompressor").is_dir():
        raise XloomError(
            "isq_missing", f"Quantisation needs llmcompressor, which is not in {folder}.", "Run `make install`.", 500
        )
    return folder


def versions() -> str:
    """The overlay's own packages with their versions: what a result depends on."""
    return ",".join(sorted(entry.name.removesuffix(".dist-info") for entry in overlay().glob("*.dist-info")))


def environment() -> dict[str, str]:
    """The child's environment: the overlay first, all cores, no colours and no telemetry."""
    found = dict(os.environ)
    paths = [str(overlay()), *filter(None, [found.get("PYTHONPATH")])]
    found["PYTHONPATH"] = os.pathsep.join(paths)
    found.pop("OMP_NUM_THREADS", None)  # Ray sets it to the actor's CPUs, which says nothing of a child's work
    found["TOKENIZERS_PARALLELISM"] = "false"
    return found
