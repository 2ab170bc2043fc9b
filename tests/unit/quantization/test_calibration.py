"""Calibration text: where it comes from, and that what judges a result was kept from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xloom.protocol import XloomError
from xloom.quantization.calibration import documents, encoder, fingerprint, windows


def numbers(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_held_out_documents_of_the_sample_are_kept_from_calibration() -> None:
    shown, kept = documents("sample", held_out=False), documents("sample", held_out=True)
    assert len(shown) == len(kept) == 4
    for ours, theirs in zip(shown, kept, strict=True):
        assert ours
        assert theirs
        assert len(theirs) < len(ours)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.jsonl", "\n".join(json.dumps({"text": f"line {number}"}) for number in range(64))),
        ("list.json", json.dumps([f"line {number}" for number in range(64)])),
        ("chats.json", json.dumps([{"messages": [{"role": "user", "content": f"line {n}"}]} for n in range(64)])),
        ("other.json", json.dumps([{"id": 1, "question": f"line {number}"} for number in range(64)])),
        ("plain.txt", "\n\n".join(f"line {number}" for number in range(64))),
    ],
)
def test_a_file_of_any_form_gives_its_texts(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    (shown,), (kept,) = documents(str(file), held_out=False), documents(str(file), held_out=True)
    assert sorted(shown + kept) == sorted(f"line {number}" for number in range(64))
    assert len(kept) == 4


def test_one_long_text_is_split_so_that_some_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"word {number} " for number in range(2000)))
    (shown,), (kept,) = documents(str(file), held_out=False), documents(str(file), held_out=True)
    assert kept
    assert not set(shown) & set(kept)


@pytest.mark.parametrize(("name", "content"), [("none.txt", None), ("empty.txt", " \n\n "), ("broken.json", "[")])
def test_text_that_can_not_be_had_is_an_error_with_a_cure(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(XloomError) as caught:
        documents(str(tmp_path / name), held_out=False)
    assert caught.value.code == "no_calibration"
    assert caught.value.cure


def test_windows_are_whole_and_alternate_between_domains() -> None:
    made = windows([["a" * 50] * 9, ["b" * 30] * 9], numbers, count=6, length=40)
    assert [len(window) for window in made] == [40] * 6
    assert [chr(window[0]) for window in made] == ["a", "b"] * 3


def test_windows_are_the_same_each_time() -> None:
    texts = [[f"text {number}" for number in range(99)]]
    assert windows(texts, numbers, 5, 20) == windows(texts, numbers, 5, 20)


def test_short_text_gives_one_short_window() -> None:
    assert [len(window) for window in windows([["abc"]], numbers, 4, 40)] == [3]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one")
    second.write_text("one")
    assert fingerprint(str(first)) == fingerprint(str(second))
    second.write_text("two")
    assert fingerprint(str(first)) != fingerprint(str(second))
    assert fingerprint("sample") == fingerprint("sample")
    assert fingerprint("some/dataset") == "dataset:some/dataset"


def test_special_tokens_of_the_sample_mean_nothing_to_other_tokenizers() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"<|end|>": 1}

        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": numbers(text)}

    assert encoder(Tokenizer())("<|begin|>x<|end|>") == numbers("\nx<|end|>")
