"""What is read of a record of calibration text: what was said, and never its ids or Python's word for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xloom.protocol import XloomError
from xloom.quantization.calibration import documents, located


def read(folder: Path, record: Any) -> set[str]:
    """The texts of a file of many such records."""
    file = folder / "text.jsonl"
    file.write_text("\n".join([json.dumps(record)] * 64), encoding="utf-8")
    return {text for kept in (False, True) for (texts,) in [documents(str(file), held_out=kept)] for text in texts}


PARTS = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"id": "a1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "hi\nyes"),
        ({"id": "a1", "messages": [{"role": "user", "content": PARTS}]}, "look"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}, {"content": "so"}]}, "so"),
        ({"messages": ["one", "two"]}, "one\ntwo"),
        ({"instruction": "do", "input": "", "output": "done"}, "do\ndone"),
        ({"id": "a1", "prompt": "do", "completion": "done"}, "do\ndone"),
        ({"source": "web", "content": "page"}, "page"),
        ("broken \ud800 letter", "broken ? letter"),
    ],
)
def test_the_text_of_a_record(tmp_path: Path, record: Any, text: str) -> None:
    assert read(tmp_path, record) == {text}


@pytest.mark.parametrize(
    "record",
    [
        {"id": "a1", "created": "today"},
        {"messages": [{"role": "user"}]},
        {"messages": [7]},
        {"messages": [{"content": {"a": 1}}]},
        {"text": {"a": 1}},
        17,
        None,
        ["a"],
    ],
)
def test_a_record_without_known_text_is_refused_by_its_line(tmp_path: Path, record: Any) -> None:
    with pytest.raises(XloomError) as caught:
        read(tmp_path, record)
    assert caught.value.code == "no_calibration"
    assert "line 1" in caught.value.message


@pytest.mark.parametrize("record", [{"text": None}, {"text": ""}, {"messages": []}])
def test_records_of_nothing_are_no_text(tmp_path: Path, record: Any) -> None:
    with pytest.raises(XloomError) as caught:
        read(tmp_path, record)
    assert "holds no text" in caught.value.message


def test_a_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert located("./text.txt") == str(tmp_path / "text.txt")
    assert located("sample") == "sample"
    assert located("some/dataset") == "some/dataset"
