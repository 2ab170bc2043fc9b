"""What requests mix by weights of their own, in the store: by the set, bounded, and gone with its adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import linear_router, tiny_adapter
from xloom.adapters.catalog import AdapterCatalog
from xloom.adapters.manifest import Entry
from xloom.adapters.request_mixtures import HOLD_S, Uses, request_mixture_name
from xloom.mixtures.linear_router import save_linear_router
from xloom.protocol import Blend, XloomError


@pytest.fixture
def catalog(tmp_path: Path, base: Path) -> AdapterCatalog:
    made = AdapterCatalog(tmp_path / "store", str(base), max_rank=64)
    for number, (name, rank) in enumerate({"code": 4, "docs": 2, "wide": 60}.items()):
        made.add(name, str(tiny_adapter(tmp_path / name, base, rank=rank, targets=("q_proj",), seed=number)))
    return made


def parts(catalog: AdapterCatalog, *names: str) -> dict[str, str]:
    entries = catalog.manifest
    return {name: entry.generation for name in names if (entry := entries.get(name)) is not None}


def gathered(catalog: AdapterCatalog, *names: str, max_rank: int = 64) -> Entry:
    with catalog.gather(parts(catalog, *names), max_rank) as staged:
        return catalog.commit(staged, replace=True, max_rank=max_rank)


def test_a_set_has_one_stack_whatever_the_order_of_its_names(catalog: AdapterCatalog) -> None:
    first, second = gathered(catalog, "docs", "code"), gathered(catalog, "code", "docs")
    assert first == second
    assert (first.kind, first.rank, first.adapters) == ("fixed", 6, ("code", "docs"))
    assert first.name == request_mixture_name(parts(catalog, "code", "docs"))
    assert gathered(catalog, "code").adapters == ("code",)  # one alone, at a weight of its own
    assert [entry.name for entry in catalog.entries()] == ["code", "docs", "wide"]
    assert first.ref.of_requests
    assert first.ref.label == "+requests"


def test_a_stack_is_what_a_fixed_mixture_of_the_same_adapters_is(catalog: AdapterCatalog, tmp_path: Path) -> None:
    sources = {name: str(tmp_path / name) for name in ("code", "docs")}
    named = catalog.add("both", "", "fixed", blend=Blend("fixed", sources))
    assert gathered(catalog, "docs", "code").generation == named.generation


@pytest.mark.parametrize("kind", ["arrow", "fixed", "linear"])
def test_any_mixtures_stack_takes_constants(catalog: AdapterCatalog, tmp_path: Path, base: Path, kind: str) -> None:
    sources = {name: str(tmp_path / name) for name in ("docs", "code")}
    if kind == "linear":
        folders = {name: Path(source) for name, source in sources.items()}
        save_linear_router(tmp_path / "router", linear_router(base, folders))
        file = tmp_path / "router" / "router_config.json"
        said = json.loads(file.read_text()) | {"adapters": {name: f"../{name}" for name in folders}}
        file.write_text(json.dumps(said))
        mixture = catalog.add("both", str(tmp_path / "router"))
    else:
        mixture = catalog.add("both", "", kind, blend=Blend(kind, sources))
    assert mixture.adapters == ("docs", "code")
    entry = gathered(catalog, "both")
    assert (entry.kind, entry.rank, entry.adapters) == ("fixed", 6, ("docs", "code"))
    files, own = catalog.files(entry.generation), catalog.files(mixture.generation)
    assert files["adapter_model.safetensors"] == own["adapter_model.safetensors"]
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors", "xlora.json"]


def test_too_much_rank_is_refused_before_the_weights_are_read(
    catalog: AdapterCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xloom.mixtures.prepare_mixture.read_lora", None)
    with pytest.raises(XloomError, match="add up to 66; these engines take up to 64") as failure:
        gathered(catalog, "wide", "docs", "code")
    assert (failure.value.code, failure.value.status) == ("rank_too_large", 400)
    assert not list(catalog._incoming.iterdir())


def test_a_stack_goes_with_any_of_its_adapters_and_with_a_new_deployment(
    catalog: AdapterCatalog, tmp_path: Path, base: Path
) -> None:
    first, other = gathered(catalog, "docs", "code"), gathered(catalog, "wide")
    anew = tiny_adapter(tmp_path / "anew", base, rank=4, targets=("q_proj",), seed=9)
    catalog.add("code", str(anew), replace=True)
    assert list(catalog.manifest.of_requests) == [other.name]
    assert not (catalog._prepared / first.generation).exists()
    catalog.remove("wide")
    assert not catalog.manifest.of_requests
    again = gathered(catalog, "docs", "code")
    assert again.generation != first.generation
    assert catalog.prune([]) == []
    assert not catalog.manifest.of_requests


def test_adapters_that_are_gone_meanwhile_are_said_to_be(catalog: AdapterCatalog) -> None:
    wanted = parts(catalog, "code", "docs")
    catalog.remove("docs")
    with pytest.raises(XloomError) as failure, catalog.gather(wanted, 64):
        pass
    assert failure.value.code == "adapter_superseded"


def test_a_damaged_stack_is_made_again_of_the_adapters_that_are_here(catalog: AdapterCatalog) -> None:
    entry = gathered(catalog, "docs", "code")
    files = catalog.files(entry.generation)
    (catalog._prepared / entry.generation / "xlora.json").write_text("{}")
    catalog.mend(entry.generation)
    assert catalog.files(entry.generation) == files


def test_a_mixture_of_served_adapters_is_made_of_what_is_served(
    catalog: AdapterCatalog, tmp_path: Path, base: Path
) -> None:
    sources = {name: str(tmp_path / name) for name in ("code", "docs")}
    from_sources = catalog.add("first", "", "arrow", blend=Blend("arrow", sources, top_k=1))
    tiny_adapter(tmp_path / "code", base, rank=4, targets=("q_proj",), seed=77)  # other content by now
    blend = Blend("arrow", sources, top_k=1, generations=parts(catalog, "code", "docs"))
    assert catalog.add("second", "", "arrow", blend=blend).generation == from_sources.generation


def test_a_catalog_of_an_earlier_release_learns_its_mixtures_adapters(
    catalog: AdapterCatalog, tmp_path: Path, base: Path
) -> None:
    sources = {name: str(tmp_path / name) for name in ("code", "docs")}
    catalog.add("both", "", "arrow", blend=Blend("arrow", sources))
    for file in (tmp_path / "store").glob("manifest.json*"):
        written = json.loads(file.read_text())
        for entry in written["entries"]:
            del entry["adapters"], entry["parts"]
        file.write_text(json.dumps(written))
    opened = AdapterCatalog(tmp_path / "store", str(base), max_rank=64)
    assert [entry.adapters for entry in opened.entries()] == [(), (), (), ("code", "docs")]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_was_used_longest_ago_gives_way_and_what_is_used_does_not() -> None:
    clock = Clock()
    uses = Uses(clock)
    for name in ("+a", "+b", "+c"):
        uses.mark([name])
        clock.now += 20
    there = ["+a", "+b", "+c"]
    assert uses.to_give_way(there, 4) == []
    assert uses.to_give_way(there, 3) == ["+a"]
    assert uses.to_give_way(there, 2) == ["+a", "+b"]
    uses.mark(["+a"])
    assert uses.to_give_way(there, 3) == ["+b"]
    with pytest.raises(XloomError) as failure:
        uses.to_give_way(there, 1)
    assert (failure.value.code, failure.value.status) == ("mixtures_busy", 503)
    clock.now += HOLD_S + 1
    assert set(uses.to_give_way(there, 1)) == set(there)


def test_what_nobody_uses_is_idle_and_what_is_not_known_counts_as_used_just_now() -> None:
    clock = Clock()
    uses = Uses(clock)
    assert uses.idle(["+a", "+b"], 600) == []
    clock.now += 599
    uses.mark(["+b"])
    assert uses.idle(["+a", "+b"], 600) == []
    clock.now += 2
    assert uses.idle(["+a", "+b"], 600) == ["+a"]
