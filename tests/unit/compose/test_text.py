"""Text for a router: read, cut into rows, and held out; what can't be used is told by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from xloom.compose.text import Batches, Streams, held_out_rows, text_encoder
from xloom.protocol import XloomError
from xloom.settings import SAMPLE


def encode(text: str) -> list[int]:
    return list(text.encode())


def read(folder: Path, content: bytes, held_out: bool = False, suffix: str = ".txt") -> Streams:
    file = folder / f"text{suffix}"
    file.write_bytes(content)
    return Streams.read({"code": str(file)}, None, encode, held_out=held_out, limit=1 << 20)


@pytest.mark.parametrize(
    ("content", "suffix", "said"),
    [
        (b"", ".txt", "The text of code"),
        (b"\n\n \n", ".txt", "holds no text"),
        ("naïve café".encode("latin-1"), ".txt", "not UTF-8"),
        ("text".encode("utf-16"), ".jsonl", "not UTF-8"),
        (b'{"text": "a"}\n{broken', ".jsonl", "can't be read"),
        (b"a,b", ".csv", "is no .txt, .json or .jsonl"),
    ],
)
def test_a_file_without_readable_text_is_told(tmp_path: Path, content: bytes, suffix: str, said: str) -> None:
    with pytest.raises(XloomError) as caught:
        read(tmp_path, content, suffix=suffix)
    assert caught.value.code == "no_calibration"
    assert said in caught.value.message
    assert "iconv" in caught.value.cure or "UTF-8" not in caught.value.message


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught:
        Streams.read({"code": str(tmp_path / "no.jsonl")}, None, encode, held_out=False, limit=9)
    assert caught.value.code == "no_calibration"
    assert "The text of code" in caught.value.message


def test_one_long_text_is_cut_and_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    content = " ".join(map(str, range(4000))).encode()
    training, kept = read(tmp_path, content), read(tmp_path, content, held_out=True)
    assert len(training.domains["code"]) + len(kept.domains["code"]) == len(content)
    assert 0.05 < len(kept.domains["code"]) / len(content) < 0.07
    rows = held_out_rows(kept, 4, 256, 0)
    assert set(rows) == {"code"}
    assert rows["code"].shape[1] == 256


def test_too_little_text_is_told(tmp_path: Path) -> None:
    streams = read(tmp_path, b"only a few words")
    for use in (Batches(streams, 2, 64, 32, 0).check, lambda: held_out_rows(streams, 2, 512, 0)):
        with pytest.raises(XloomError) as caught:
            use()
        assert caught.value.code == "too_little_text"
        assert "code" in caught.value.message


def test_a_row_joins_domains_and_every_other_one_is_mixed() -> None:
    streams = Streams({"a": torch.full((50,), 1), "b": torch.full((50,), 2)}, torch.full((90,), 3))
    batches = Batches(streams, rows=6, length=40, piece=20, seed=1)
    ids, domains = batches.draw(3)
    assert ids.shape == domains.shape == (6, 40)
    assert torch.equal(domains[1::2], torch.full((3, 40), -1))
    assert torch.equal(ids[1::2], torch.full((3, 40), 3))
    assert torch.equal(domains[::2] + 1, ids[::2])
    assert all(torch.equal(one, other) for one, other in zip(batches.draw(3), (ids, domains), strict=True))
    assert not torch.equal(torch.cat([batches.draw(step)[0] for step in range(4)]), ids.repeat(4, 1))


def test_the_samples_own_text_goes_by_domain() -> None:
    with pytest.raises(XloomError) as caught:
        Streams.read({"poems": "sample"}, None, encode, held_out=True, limit=10)
    assert caught.value.code == "no_calibration"
    assert "code, docs, json, maths" in caught.value.message


def test_begin_of_text_that_is_written_out_is_there_once() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "base")
    encode, begin = text_encoder(tokenizer), tokenizer.bos_token_id
    assert list(encode("<|begin|>11 sums"))[:2] == [begin, *list(encode("11 sums"))[1:2]]
    assert list(encode("11 sums")).count(begin) == 1
