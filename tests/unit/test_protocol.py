from __future__ import annotations

from pathlib import Path

import pytest

from xloom.protocol import AdapterRef, adapter_key, split_adapter_key

PACKAGE = Path(__file__).parents[2] / "deployments" / "xloom"


def test_a_key_gives_back_the_name_and_the_generation_it_was_made_of() -> None:
    ref = AdapterRef("code-2.1", "ff" * 32, "lora")
    assert ref.key == adapter_key(ref.name, ref.generation) == "code-2.1@" + "ff" * 32
    assert split_adapter_key(ref.key) == (ref.name, ref.generation)


@pytest.mark.parametrize(("key", "parts"), [("code", ("code", "")), ("a@b@1", ("a@b", "1")), ("", ("", ""))])
def test_the_last_at_sign_is_the_one_that_separates(key: str, parts: tuple[str, str]) -> None:
    assert split_adapter_key(key) == parts


def test_keys_are_spelt_in_one_place() -> None:
    spelt = {file.name for file in PACKAGE.rglob("*.py") if "}@{" in file.read_text(encoding="utf-8")}
    assert spelt == {"protocol.py"}
