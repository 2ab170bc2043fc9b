"""What `xloom serve` makes of settings before it starts anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xloom.app import run_time_rules
from xloom.launch import with_own_folder
from xloom.protocol import XloomError
from xloom.settings import parse_settings

HERE = Path("/home/me/work")


def sources(folder: Path = HERE, **data: Any) -> list[str]:
    return with_own_folder(parse_settings(data), folder).store.sources


def test_what_lies_where_it_was_started_may_be_added_on_a_machine_of_ones_own() -> None:
    assert sources() == ["hf://", "/home/me/work"]
    assert sources(store={"path": "./store"}) == ["hf://", "/home/me/work"]


@pytest.mark.parametrize(
    ("folder", "data"),
    [
        (HERE, {"store": {"sources": ["hf://"]}}),
        (HERE, {"router": {"host": "0.0.0.0", "api_key": "k"}}),
        (Path("/"), {}),  # as a container or a service is started
    ],
)
def test_elsewhere_folders_must_be_given(folder: Path, data: dict[str, Any]) -> None:
    assert sources(folder, **data) == ["hf://"]


def test_what_the_settings_name_may_be_added_again_and_nothing_beside_it() -> None:
    adapters = [{"name": "law", "source": "/adapters/law"}]
    bundles = [{"name": "blend", "source": "s3://bucket/blend"}]
    rules = run_time_rules(parse_settings({"adapters": adapters, "xlora": bundles, "store": {"limits": {"files": 3}}}))
    assert rules.limits.files == 3
    for source in ("/adapters/law", "s3://bucket/blend", "org/name"):
        rules.check(source)
    for source in ("/adapters/code", "/adapters", "s3://bucket/other", "http://10.0.0.1/x"):
        with pytest.raises(XloomError, match="does not take adapters from"):
            rules.check(source)
