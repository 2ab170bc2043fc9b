"""What `xloom serve` says when a deployment does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from xloom.launch import _start_failed, check_model
from xloom.protocol import XloomError
from xloom.settings import SAMPLE, ModelSettings

TRACE = """The deployment failed to start 3 times in a row. See controller logs for details.
ray::ServeReplica:xloom:engine.initialize_and_get_metadata() (pid=1)
  File "actor.py", line 41, in __init__
xloom.protocol.XloomError: No model could be read from '/nowhere'. Name a local folder. [model_not_loadable]
"""


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught:
        check_model(ModelSettings(source=str(tmp_path)))
    assert caught.value.code == "model_not_loadable"
    check_model(ModelSettings(source=str(SAMPLE / "base")))
    check_model(ModelSettings(source="org/model"))  # a hub id: the engine will see


def test_our_own_error_is_shown_without_its_traceback() -> None:
    error = _start_failed(["", TRACE])
    assert error.code == "start_failed"
    assert "No model could be read from '/nowhere'" in error.message
    assert "[model_not_loadable]" in error.message
    assert "line 41" not in error.message


def test_anothers_error_is_shown_with_the_end_of_its_traceback() -> None:
    error = _start_failed([TRACE.rpartition("xloom.protocol")[0] + "ValueError: no kernel for this\n"])
    assert "line 41" in error.message
    assert error.message.endswith("ValueError: no kernel for this")
