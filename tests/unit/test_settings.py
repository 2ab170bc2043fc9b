from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xloom.protocol import XloomError
from xloom.settings import SAMPLE, Settings, client_key, load_settings, parse_settings

DOC = Path(__file__).parents[2] / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLOOM_API_KEY", raising=False)
    monkeypatch.delenv("XLOOM_ADMIN_KEY", raising=False)


def refusal(data: dict[str, Any]) -> XloomError:
    with pytest.raises(XloomError) as caught:
        parse_settings(data)
    assert caught.value.code == "invalid_settings"
    return caught.value


def test_an_empty_deployment_has_the_documented_defaults() -> None:
    settings = parse_settings({})
    pages = settings.engine.paged_attention
    assert (pages.block_size, pages.max_blocks, pages.gpu_memory_fraction) == (16, 4096, 0.9)
    assert pages.enable_prefix_caching
    assert (settings.engine.backend, settings.engine.dtype, settings.engine.max_model_len) == ("auto", "auto", 2048)
    assert (settings.replicas.min, settings.replicas.max) == (1, 1)
    assert settings.model.served_name == "base"


def test_the_contracts_own_example_is_taken() -> None:
    settings = parse_settings(
        {
            "model": {"source": "org/model", "served_name": "base"},
            "engine": {
                "backend": "auto",
                "dtype": "float32",
                "max_model_len": 2048,
                "paged_attention": {
                    "block_size": 16,
                    "max_blocks": 4096,
                    "gpu_memory_fraction": 0.9,
                    "enable_prefix_caching": True,
                },
                "extra_args": {"seed": 1},
            },
            "adapters": [{"name": "code", "source": "s3://bucket/code"}],
            "xlora": [
                {"name": "blend", "source": "./blend", "top_k": None, "temperature": None, "mixing_mode": "additive"}
            ],
            "replicas": {"min": 1, "max": 2},
        }
    )
    assert settings.engine.extra_args == {"seed": 1}
    assert settings.xlora[0].mixing_mode == "additive"


@pytest.mark.parametrize(
    ("data", "nearest"),
    [
        ({"modle": {}}, "model"),
        ({"engine": {"max_model_length": 5}}, "max_model_len"),
        ({"engine": {"paged_attention": {"blocksize": 5}}}, "block_size"),
        ({"adapters": [{"name": "a", "sources": "b"}]}, "source"),
        ({"xlora": [{"name": "a", "source": "b", "topk": 1}]}, "top_k"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(data: dict[str, Any], nearest: str) -> None:
    assert f"did you mean {nearest!r}?" in refusal(data).message


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"replicas": {"min": 3, "max": 2}}, "replicas.max (2)"),
        ({"adapters": [{"name": "a", "source": "x"}, {"name": "a", "source": "y"}]}, "'a' is used 2 times"),
        ({"adapters": [{"name": "base", "source": "x"}]}, "'base' is already that of the base model"),
        (
            {"adapters": [{"name": "a", "source": "x"}], "xlora": [{"name": "a", "source": "y"}]},
            "'a' is already that of an adapter",
        ),
        ({"adapters": [{"name": "../a", "source": "x"}]}, "adapters.0.name"),
        ({"adapters": [{"name": "a//b", "source": "x"}]}, "adapters.0.name"),
        ({"xlora": [{"name": "a", "source": "x", "mixing_mode": "median"}]}, "xlora.0.mixing_mode"),
        ({"xlora": [{"name": "a", "source": "x", "temperature": 0}]}, "xlora.0.temperature"),
        ({"engine": {"dtype": "int3"}}, "engine.dtype"),
        ({"router": {"port": 70000}}, "router.port"),
        ({"engine": 3}, "engine"),
    ],
)
def test_a_wrong_value_is_named(data: dict[str, Any], named: str) -> None:
    assert named in refusal(data).message


def test_settings_do_not_change() -> None:
    settings = parse_settings({})
    with pytest.raises(ValueError, match="frozen"):
        settings.router.port = 1  # type: ignore[misc]


def test_local_sources_are_resolved_against_the_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "model: {source: ./base}\n"
        "adapters: [{name: a, source: ../a}, {name: b, source: org/b}, {name: c, source: s3://bucket/c}]\n"
    )
    settings = load_settings(file)
    assert settings.model.source == str(tmp_path / "base")
    sources = [adapter.source for adapter in settings.adapters]
    assert sources == [str(tmp_path.parent / "a"), "org/b", "s3://bucket/c"]


@pytest.mark.parametrize(
    ("source", "location"),
    [
        ("org/name", "hf://org/name/a/b"),
        ("org/name@v1", "hf://org/name/a/b@v1"),
        ("hf://org/name/c@v1", "hf://org/name/c/a/b@v1"),
        ("s3://bucket/c/", "s3://bucket/c/a/b"),
        ("/srv/adapters", "/srv/adapters/a/b"),
    ],
)
def test_a_sub_folder_is_part_of_where_an_adapter_is(source: str, location: str) -> None:
    entry = {"name": "x", "source": source}
    assert parse_settings({"adapters": [entry]}).adapters[0].location == source
    assert parse_settings({"adapters": [entry | {"subfolder": "a/b"}]}).adapters[0].location == location


@pytest.mark.parametrize("folder", ["../a", "a/../b", "/a", "a//b", ".", "", "a/", "a\\b", "a@v2"])
def test_a_sub_folder_does_not_leave_its_source(folder: str) -> None:
    error = refusal({"adapters": [{"name": "x", "source": "org/name", "subfolder": folder}]})
    assert "adapters.0.subfolder" in error.message


def test_without_a_file_the_sample_is_described() -> None:
    settings = load_settings(None)
    assert settings.model.source == str(SAMPLE / "base")
    assert settings.xlora_enabled


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught:
        load_settings(tmp_path / "none.yaml")
    assert caught.value.code == "settings_not_found"


@pytest.mark.parametrize("text", ["- a list\n", "a: [1\n", "\ttab: 1\n", "model\n"])
def test_a_file_that_is_no_mapping_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(XloomError) as caught:
        load_settings(tmp_path / "settings.yaml")
    assert caught.value.code == "invalid_settings"


def test_xlora_is_enabled_by_a_bundle_or_by_will() -> None:
    bundle = {"name": "blend", "source": "./blend"}
    assert not parse_settings({}).xlora_enabled
    assert parse_settings({"xlora": [bundle]}).xlora_enabled
    assert parse_settings({"engine": {"enable_xlora": True}}).xlora_enabled
    assert not parse_settings({"engine": {"enable_xlora": False}, "xlora": [bundle]}).xlora_enabled


def test_keys_come_from_the_file_or_else_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLOOM_ADMIN_KEY", "environment")
    given = parse_settings({"router": {"admin_key": "file"}}).router.admin_key
    found = parse_settings({}).router.admin_key
    assert given is not None
    assert found is not None
    assert (given.get_secret_value(), found.get_secret_value()) == ("file", "environment")
    assert parse_settings({}).router.api_key is None


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(parse_settings({"router": {"api_key": "secret"}}))


def test_a_clients_key_is_the_admin_key_before_the_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client_key() is None
    monkeypatch.setenv("XLOOM_API_KEY", "user")
    assert client_key() == "user"
    monkeypatch.setenv("XLOOM_ADMIN_KEY", "admin")
    assert client_key() == "admin"


def sections(model: type[BaseModel], path: str = "") -> dict[str, type[BaseModel]]:
    """Each section by its path, lists by their entries."""
    found = {path: model}
    for name, info in model.model_fields.items():
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(kind, f"{path}.{name}".lstrip("."))
    return found


def documented() -> dict[str, dict[str, str]]:
    """Keys and their defaults in docs/settings.md: under each heading, the rows of its table."""
    found: dict[str, dict[str, str]] = {}
    rows: dict[str, str] = {}
    for line in DOC.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## `([a-z_.]+)`", line):
            rows = found.setdefault(heading[1], {})
        elif row := re.match(r"\| `([a-z_]+)` \| (.*?) \|", line):
            rows[row[1]] = row[2].strip("`")
    return found


def default_text(info: FieldInfo) -> str:
    """A key's default as the document writes it: YAML."""
    if info.is_required():
        return "required"
    if str(info.default).startswith(str(SAMPLE)):
        return "the sample"
    if info.default is None or isinstance(info.default, bool):
        return {None: "null", True: "true", False: "false"}[info.default]
    kind = float if info.annotation is float else type(info.default)
    return str(kind(info.default))


EXPECTED = {path: model for path, model in sections(Settings).items() if path}


@pytest.mark.parametrize("path", EXPECTED)
def test_every_key_is_documented_with_its_default(path: str) -> None:
    fields = {
        name: info
        for name, info in EXPECTED[path].model_fields.items()
        if not (isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel))
    }
    rows = documented().get(path, {})
    assert rows.keys() == fields.keys()
    for name, info in fields.items():
        assert rows[name] == default_text(info), f"{path}.{name}"


def test_no_section_is_documented_that_does_not_exist() -> None:
    assert documented().keys() == EXPECTED.keys()
