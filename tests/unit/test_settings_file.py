"""A settings file read strictly: nothing in it is lost, taken for something else, or ends in a traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from xloom.commands.build import build_config
from xloom.protocol import XloomError
from xloom.settings import Settings, load_settings, parse_settings


def loaded(folder: Path, text: str | bytes) -> Settings:
    file = folder / "settings.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_settings(file)


def refused(folder: Path, text: str | bytes) -> XloomError:
    with pytest.raises(XloomError) as caught:
        loaded(folder, text)
    assert caught.value.cure
    return caught.value


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("engine: {dtype: float32}\nmodel: {source: a}\nengine: {compile: false}\n", "'engine' is there twice"),
        ("replicas:\n  min: 1\n  max: 2\n  min: 2\n", "lines 2 and 4"),
        ("adapters:\n- {name: a, source: x, source: y}\n", "'source' is there twice"),
    ],
)
def test_a_key_is_there_once(tmp_path: Path, text: str, named: str) -> None:
    error = refused(tmp_path, text)
    assert error.code == "invalid_settings"
    assert named in error.message


def test_merged_keys_are_not_doubled_ones(tmp_path: Path) -> None:
    lines = ["adapters:", "- &a {name: a, source: x, verify: true}", "- &b {<<: *a, name: b}", "- {<<: *b, name: c}"]
    text = "\n".join(lines)
    assert [(each.name, each.verify) for each in loaded(tmp_path, text).adapters] == [(n, True) for n in "abc"]


@pytest.mark.parametrize(
    "text",
    [
        "router: {port: 12:30}",
        "replicas: {max: true}",
        "replicas: {max: 99999999999999999999}",
        "xlora: [{name: a, source: b, routing_passes: true}]",
        "xlora: [{name: a, source: b, temperature: .inf}]",
        "engine: {max_lora_rank: 0}",
        "engine: {max_lora_rank: -5}",
        "engine: {max_lora_rank: 1000}",
        "engine: {max_lora_rank: true}",
        "model: {served_name: no}",
        "model: {served_name: 2024-99-99}",
    ],
)
def test_a_value_is_taken_as_written_or_refused(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text).code == "invalid_settings"


def test_what_a_library_changes_in_pyyaml_changes_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tag in ("timestamp", "int"):  # in place, as lm-format-enforcer does it at its import
        monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, f"tag:yaml.org,2002:{tag}", lambda *_: "else")
    assert refused(tmp_path, "model: {served_name: 2024-99-99}").code == "invalid_settings"
    assert loaded(tmp_path, "replicas: {max: 3}").replicas.max == 3


def test_numbers_are_decimal(tmp_path: Path) -> None:
    settings = loaded(tmp_path, "replicas: {max: 010, cpus: 1.5, target_queue_depth: 1e1}\nengine: {max_lora_rank: 64}")
    assert (settings.replicas.max, settings.replicas.cpus, settings.replicas.target_queue_depth) == (10, 1.5, 10.0)
    assert settings.engine.max_lora_rank == 64


def test_a_section_or_list_of_nothing_is_an_empty_one(tmp_path: Path) -> None:
    settings = loaded(tmp_path, "adapters:\nxlora:\nengine:\nrouter:\n  front_end_args:\n")
    assert settings == parse_settings({})


def test_a_variable_is_put_in_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret: [x]")
    monkeypatch.setenv("MY_PORT", "8123")
    monkeypatch.setenv("MY_FOLDER", "./models")
    settings = loaded(
        tmp_path,
        "router: {api_key: '${MY_KEY}', port: '${MY_PORT}', front_end_args: {chat_template: 'a $${b}'}}\n"
        "model: {source: '${MY_FOLDER}/base'}\n",
    )
    assert settings.router.api_key is not None
    assert settings.router.api_key.get_secret_value() == "s3cret: [x]"
    assert settings.router.port == 8123
    assert settings.router.front_end_args == {"chat_template": "a ${b}"}
    assert settings.model.source == str(tmp_path / "models" / "base")


def test_what_is_built_is_read_as_it_was(tmp_path: Path) -> None:
    settings = loaded(tmp_path, "router: {front_end_args: {chat_template: 'a $${b}'}}")
    args: dict[str, Any] = build_config(settings)["applications"][0]["args"]
    assert parse_settings(args).router.front_end_args == {"chat_template": "a ${b}"}


@pytest.mark.parametrize("value", ["${NOT_SET_ANYWHERE}", "${A:-b}", "${", "$MY_KEY", "''"])
def test_a_key_that_stands_for_nothing_is_refused(tmp_path: Path, value: str) -> None:
    assert "api_key" in refused(tmp_path, f"router:\n  api_key: {value}\n").message


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    error = refused(tmp_path, "model: {served_name: base}  # für\n".encode(encoding))
    assert error.code == "settings_unreadable"


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert loaded(tmp_path, "model: {served_name: a}\n".encode("utf-8-sig")).model.served_name == "a"


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught:
        load_settings(tmp_path)
    assert caught.value.code == "settings_unreadable"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("{}")
    file.chmod(0)
    with pytest.raises(XloomError) as caught:
        load_settings(file)
    assert caught.value.code == "settings_unreadable"


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "adapters: &a [*a]\n").code == "invalid_settings"
    assert refused(tmp_path, "adapters: " + "[" * 5000 + "]" * 5000).code == "invalid_settings"


def test_local_paths_are_taken_from_the_files_own_folder(tmp_path: Path) -> None:
    settings = loaded(
        tmp_path,
        "isq: {calibration: text.jsonl, cache: ./quantised}\nstore: {path: ./store}\n"
        "router: {front_end_args: {chat_template: ./chat.jinja}}\n",
    )
    assert settings.isq is not None
    assert settings.isq.calibration == str(tmp_path / "text.jsonl")
    assert settings.isq.cache == str(tmp_path / "quantised")
    assert settings.store.path == str(tmp_path / "store")
    assert settings.router.front_end_args["chat_template"] == str(tmp_path / "chat.jinja")
    assert loaded(tmp_path, "isq: {calibration: some/dataset}").isq.calibration == "some/dataset"  # type: ignore[union-attr]


def test_a_source_without_a_dot_is_a_folder_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "law").mkdir(parents=True)
    settings = loaded(
        tmp_path,
        "adapters: [{name: a, source: adapters/law}, {name: b, source: adapters/code}]\n"
        "store: {sources: [adapters, ./more, 'hf://org', /data]}\n",
    )
    assert [each.source for each in settings.adapters] == [str(tmp_path / "adapters" / "law"), "adapters/code"]
    assert settings.store.sources == [str(tmp_path / "adapters"), str(tmp_path / "more"), "hf://org", "/data"]


def test_a_key_that_is_named_as_a_kind_is_unknown(tmp_path: Path) -> None:
    assert "unknown key 'engine.int'" in refused(tmp_path, "engine: {int: 5}").message
