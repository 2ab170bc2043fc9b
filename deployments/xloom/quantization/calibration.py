"""The text a method is calibrated on, and the text its result is judged by: never the same documents."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xloom.protocol import XloomError
from xloom.settings_file import TEXT_FILES

LENGTH = 512  # tokens in a window
SHARE = 16  # one document in so many is held out
SAMPLE = "sample"
TURNS = ("messages", "conversations", "conversation", "dialog", "turns")  # OpenAI's, ShareGPT's, and others'
SAID = ("content", "value", "text")  # in a turn
FIELDS = (  # of a record without turns; those that are there are read one after another
    ("text",),
    ("content",),
    ("instruction", "input", "output"),
    ("prompt", "completion", "response"),
    ("question", "answer"),
)

Texts = list[list[str]]  # documents by domain


def fingerprint(calibration: str, setting: str = "isq.calibration") -> str:
    """What decides the texts: the file's content, the sample's recipe, or the dataset's name."""
    if calibration == SAMPLE:
        from xloom.sample import corpus

        assert corpus.__file__ is not None
        source = Path(corpus.__file__).read_bytes()  # with CPython, whose library it reads, this fixes the corpus
        return f"sample:{hashlib.sha256(source).hexdigest()}:{sys.version_info[:3]}"
    file = _file(calibration, setting)
    if file is not None:
        return f"file:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    return f"dataset:{calibration}"


def documents(calibration: str, *, held_out: bool, setting: str = "isq.calibration") -> Texts:
    """The documents to calibrate on, or those kept from it; `setting` is what an error calls the text.

    Raises `XloomError` (no_calibration).
    """
    if calibration == SAMPLE:
        from xloom.sample.corpus import DOMAINS
        from xloom.sample.corpus import documents as sample_documents

        found = [text for text in sample_documents() if text.held_out == held_out]
        return [[text.text for text in found if text.domain == domain] for domain in DOMAINS]
    file = _file(calibration, setting)
    texts = list(_file_texts(file)) if file is not None else list(_dataset_texts(calibration, setting))
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise XloomError(
            "no_calibration", f"{setting} {calibration!r} holds no text.", "Name a file with text, or sample."
        )
    if len(texts) < 2 * SHARE:  # a few long ones: by piece instead
        joined = "\n\n".join(texts)
        piece = max(1, len(joined) // (2 * SHARE))
        texts = [joined[start : start + piece] for start in range(0, len(joined), piece)]
    return [[text for number, text in enumerate(texts) if (number % SHARE == SHARE - 1) == held_out]]


def windows(
    texts: Texts, encode: Callable[[str], Sequence[int]], count: int, length: int = LENGTH, seed: int = 0
) -> list[list[int]]:
    """At most `count` windows of `length` tokens, as many from each domain, documents joined in a random order.

    A domain with less text gives fewer; the last window of all may be shorter, where there is no whole one.
    """
    rng = random.Random(seed)
    made: list[list[list[int]]] = []
    for number, domain in enumerate(texts):
        wanted = count // len(texts) + (number < count % len(texts))
        shuffled = rng.sample(domain, len(domain))
        made.append(_cut(shuffled, encode, wanted, length))
    turns = max((len(domain) for domain in made), default=0)
    mixed = [domain[turn] for turn in range(turns) for domain in made if turn < len(domain)]
    whole = [window for window in mixed if len(window) == length]
    return whole or mixed


def _cut(texts: Sequence[str], encode: Callable[[str], Sequence[int]], count: int, length: int) -> list[list[int]]:
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= count * length:
            break
        tokens += encode(text)
    return [tokens[start : start + length] for start in range(0, min(len(tokens), count * length), length)]


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """A tokenizer as `windows` wants it; the sample's special tokens are dropped where they mean nothing."""
    from xloom.sample.corpus import SPECIAL_TOKENS

    known = tokenizer.get_vocab()
    strange = [token for token in SPECIAL_TOKENS if token not in known]

    def encode(text: str) -> list[int]:
        for token in strange:
            text = text.replace(token, "\n")
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    return encode


def located(calibration: str) -> str:
    """The same text wherever a process runs: a file by its whole path. Raises `XloomError` (no_calibration)."""
    file = _file(calibration)
    return calibration if file is None else str(file.resolve())


def is_local(calibration: str) -> bool:
    """Whether the text is read from a file, not made or fetched."""
    return calibration != SAMPLE and Path(calibration).suffix in TEXT_FILES


def _file(calibration: str, setting: str = "isq.calibration") -> Path | None:
    path = Path(calibration).expanduser()
    if path.suffix not in TEXT_FILES:
        return None
    if not path.is_file():
        raise XloomError("no_calibration", f"{setting} {path} is not there.", "Name an existing file.")
    return path


def _file_texts(file: Path) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".txt":
            yield from content.split("\n\n")
            return
        if file.suffix == ".jsonl":
            lines = enumerate(content.split("\n"), start=1)
            records = [(f"line {number}", json.loads(line)) for number, line in lines if line.strip()]
        else:
            entries = json.loads(content)
            listed = entries if isinstance(entries, list) else [entries]
            records = [(f"entry {number}", entry) for number, entry in enumerate(listed, start=1)]
    except UnicodeDecodeError as error:
        message = f"{file} is not UTF-8 text (byte {error.start}: {error.reason})."
        cure = f"Save it as UTF-8: iconv -f LATIN1 -t UTF-8 {file}, or UTF-16 in place of LATIN1."
        raise XloomError("no_calibration", message, cure) from None
    except (OSError, ValueError, RecursionError) as error:
        told = error if str(error) else type(error).__name__
        raise XloomError("no_calibration", f"{file} can't be read: {told}", "Mend the file.") from None
    for place, record in records:
        yield _text_of(record, f"{file}, {place}")


def _text_of(entry: Any, place: str) -> str:
    """The text of a record: itself, its turns, or its fields of text. Raises `XloomError` (no_calibration).

    Never a guess: ids or dates would make the model ready for ids and dates.
    """
    text = entry if isinstance(entry, str) else None
    if isinstance(entry, dict):
        turns = next((entry[name] for name in TURNS if isinstance(entry.get(name), list)), None)
        if turns is not None:
            text = "\n".join(filter(None, (_turn_text(turn, place) for turn in turns)))
        else:
            fields = next((names for names in FIELDS if any(entry.get(name) for name in names)), ())
            parts = [entry[name] for name in fields if entry.get(name)]
            if fields and all(isinstance(part, str) for part in parts):
                text = "\n".join(parts)
            elif any(name in entry for names in FIELDS for name in names) and not parts:
                text = ""  # a record whose text is empty or null
    if text is None:
        raise _no_text(entry, place)
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text to a tokenizer


def _turn_text(turn: Any, place: str) -> str:
    """What is said in one turn of a conversation; nothing where it calls a tool."""
    if isinstance(turn, str):
        return turn
    if not isinstance(turn, dict) or not any(name in turn for name in SAID):
        raise _no_text(turn, place)
    said = next((turn[name] for name in SAID if turn.get(name) is not None), "")
    if isinstance(said, list):  # parts, of which images and the like are no text
        parts = [part.get("text") if isinstance(part, dict) else part for part in said]
        return "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(said, str):
        raise _no_text(turn, place)
    return said


def _no_text(entry: Any, place: str) -> XloomError:
    has = f"the fields {', '.join(map(repr, entry))}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
    fields = "; ".join(" and ".join(names) for names in FIELDS)
    return XloomError(
        "no_calibration",
        f"{place} has no text that is known as such: {has}.",
        f"Records are texts, turns ({', '.join(TURNS)}), or hold {fields}.",
    )


def _dataset_texts(name: str, setting: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise XloomError(
            "missing_package", "A hub dataset needs the package datasets.", "pip install datasets", 500
        ) from None
    try:
        dataset = load_dataset(name, split="train", streaming=True)
        for number, entry in enumerate(dataset):
            if number >= 20_000:
                return
            yield _text_of(entry, f"{name}, row {number + 1}")
    except XloomError:
        raise
    except Exception as error:  # the hub's and the reader's errors have no common class
        raise XloomError(
            "no_calibration",
            f"{setting} {name!r} is no {', '.join(TEXT_FILES)} file, nor a dataset that can be read: {error}",
            "Name an existing file or dataset, or sample.",
        ) from None
