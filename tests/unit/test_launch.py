"""What `xloom serve` refuses before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from xloom.launch import check_model
from xloom.protocol import XloomError
from xloom.settings import SAMPLE, ModelSettings


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught:
        check_model(ModelSettings(source=str(tmp_path)))
    assert caught.value.code == "model_not_loadable"
    check_model(ModelSettings(source=str(SAMPLE / "base")))
    check_model(ModelSettings(source="org/model"))  # a hub id: the engine will see
