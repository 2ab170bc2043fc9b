"""Mixtures of adapters, and learned linear routers, in the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import linear_router, tiny_adapter
from xloom.adapters.catalog import AdapterCatalog
from xloom.adapters.wanted import wanted
from xloom.mixtures.linear_router import save_linear_router
from xloom.protocol import Blend, XloomError
from xloom.settings import parse_settings


@pytest.fixture
def catalog(tmp_path: Path, base: Path) -> AdapterCatalog:
    return AdapterCatalog(tmp_path / "store", str(base), max_rank=64)


@pytest.fixture
def sources(tmp_path: Path, base: Path) -> dict[str, str]:
    return {
        name: str(tiny_adapter(tmp_path / name, base, rank=rank, targets=targets))
        for name, rank, targets in (("code", 4, ("q_proj",)), ("docs", 2, ("q_proj", "down_proj")))
    }


def test_a_mixture_is_prepared_once_from_its_adapters_and_mended_from_them(
    catalog: AdapterCatalog, sources: dict[str, str]
) -> None:
    blend = Blend("arrow", sources, top_k=1)
    entry = catalog.add("both", "arrow: code, docs", "arrow", blend=blend)
    assert (entry.kind, entry.rank, entry.blend) == ("arrow", 6, blend)
    assert entry.targets == ("down_proj", "q_proj")
    files = catalog.files(entry.generation)
    described = json.loads(files["xlora.json"])
    assert (described["kind"], described["adapter_names"]) == ("arrow", ["code", "docs"])
    assert catalog.add("both", "arrow: code, docs", "arrow", blend=blend) == entry
    damaged = catalog._prepared / entry.generation / "xlora.json"
    damaged.write_text("{}")
    with pytest.raises(XloomError, match="damaged"):
        catalog.files(entry.generation)
    catalog.mend(entry.generation)
    assert catalog.files(entry.generation) == files


def test_options_and_weights_are_part_of_a_mixtures_generation(
    catalog: AdapterCatalog, sources: dict[str, str]
) -> None:
    blends = [
        Blend("arrow", sources),
        Blend("arrow", sources, top_k=1),
        Blend("arrow", sources, temperature=0.5),
        Blend("fixed", sources),
        Blend("fixed", sources, weights={"code": 1.0}),
    ]
    found = [catalog.add(f"m{number}", "", blend.routing, blend=blend) for number, blend in enumerate(blends)]
    assert len({entry.generation for entry in found}) == len(blends)


def test_a_mixture_of_what_is_no_adapter_is_refused(
    catalog: AdapterCatalog, sources: dict[str, str], tmp_path: Path, base: Path
) -> None:
    folders = {name: Path(source) for name, source in sources.items()}
    save_linear_router(tmp_path, linear_router(base, folders))
    for sort, source in {"wrong_kind": tmp_path, "source_not_found": tmp_path / "nothing"}.items():
        with pytest.raises(XloomError) as failure:
            catalog.add("both", "", "arrow", blend=Blend("arrow", sources | {"odd": str(source)}))
        assert failure.value.code == sort
    assert not list(catalog._incoming.iterdir())


@pytest.mark.parametrize("kind", [None, "xlora", "linear"])
def test_a_learned_router_comes_with_the_adapters_beside_it(
    catalog: AdapterCatalog, sources: dict[str, str], tmp_path: Path, base: Path, kind: str | None
) -> None:
    folders = {name: Path(source) for name, source in sources.items()}
    save_linear_router(tmp_path / "router", linear_router(base, folders))
    file = tmp_path / "router" / "router_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"adapters": {name: f"../{name}" for name in folders}}))
    entry = catalog.add("routed", str(tmp_path / "router"), kind)
    assert (entry.kind, entry.rank) == ("linear", 6)


def test_the_settings_name_adapters_of_theirs_and_sources() -> None:
    data = {
        "adapters": [{"name": "code", "source": "hf://org/the-code", "subfolder": "v2"}],
        "mixtures": [
            {"name": "both", "adapters": ["code", "hf://org/docs@main"], "top_k": 1, "temperature": 0.5},
            {"name": "less", "adapters": ["code", "hf://org/docs"], "subtract": ["hf://org/general"]},
            {"name": "half", "routing": "fixed", "adapters": ["code", "hf://org/docs"], "weights": {"docs": 0.5}},
        ],
    }
    _, both, less, half = wanted(parse_settings(data, with_keys=False))
    adapters = {"code": "hf://org/the-code/v2", "docs": "hf://org/docs@main"}
    assert both.blend == Blend("arrow", adapters, top_k=1, temperature=0.5)
    assert less.source == "arrow: code, docs, less general"
    assert less.blend is not None
    assert less.blend.subtract == {"general": "hf://org/general"}
    assert (half.kind, half.blend and half.blend.weights) == ("fixed", {"docs": 0.5})


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"adapters": ["code"]}, "at least 2"),
        ({"adapters": ["code", "code"]}, "twice"),
        ({"adapters": ["code", "docs"], "top_k": 3}, "top_k"),
        ({"adapters": ["code", "docs"], "weights": {"code": 1}}, "routing: fixed"),
        ({"adapters": ["code", "docs"], "routing": "fixed", "top_k": 1}, "routing: arrow"),
        ({"adapters": ["code", "docs"], "routing": "fixed", "weights": {"poems": 1}}, "poems"),
        ({"adapters": ["code", "docs"], "routing": "fixed", "subtract": ["general"]}, "subtract"),
        ({"adapters": ["code", "docs"], "routing": "xlora"}, "arrow"),
        ({"adapters": ["code", "docs"], "name": "base"}, "base model"),
    ],
)
def test_settings_of_a_mixture_that_can_not_be_are_refused(mixture: dict[str, object], said: str) -> None:
    with pytest.raises(XloomError, match=said) as failure:
        parse_settings({"mixtures": [{"name": "both"} | mixture]}, with_keys=False)
    assert failure.value.code == "invalid_settings"


def test_arrow_needs_a_model_on_one_device() -> None:
    data = {"engine": {"tensor_parallel_size": 2}, "mixtures": [{"name": "both", "adapters": ["a", "b"]}]}
    with pytest.raises(XloomError, match="tensor_parallel_size"):
        parse_settings(data, with_keys=False)


def test_local_folders_of_a_mixture_are_taken_from_the_settings_own_folder(tmp_path: Path) -> None:
    data = {"mixtures": [{"name": "both", "adapters": ["./code", "hf://org/docs"]}]}
    settings = parse_settings(data, with_keys=False, folder=tmp_path)
    assert settings.mixtures[0].adapters == [str(tmp_path / "code"), "hf://org/docs"]


def test_an_adapters_name_is_no_folder_that_happens_to_have_it(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    data = {
        "adapters": [{"name": "code", "source": "hf://org/code-v2"}],
        "mixtures": [{"name": "both", "adapters": ["code", "hf://org/docs"]}],
    }
    settings = parse_settings(data, with_keys=False, folder=tmp_path)
    assert settings.mixtures[0].adapters == ["code", "hf://org/docs"]
