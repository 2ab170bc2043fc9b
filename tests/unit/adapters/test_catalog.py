from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from tests.models import ATTENTION, tiny_adapter, tiny_bundle, tiny_model
from xloom.adapters.catalog import AdapterCatalog
from xloom.adapters.manifest import generation_of
from xloom.adapters.source_rules import SourceRules
from xloom.adapters.sources import Limits
from xloom.protocol import Overrides, XloomError, adapter_key, adapter_number

Open = Callable[..., AdapterCatalog]


@pytest.fixture
def open_catalog(tmp_path: Path, base: Path) -> Open:
    def opened(**options: Any) -> AdapterCatalog:
        arguments = {"max_rank": 64, "reserved_names": ("base",)} | options
        return AdapterCatalog(tmp_path / "store", str(base), **arguments)

    return opened


def prepared(folder: Path) -> set[str]:
    return {path.name for path in (folder / "store" / "prepared").iterdir()}


def refused(catalog: AdapterCatalog, name: str, source: Path | str, **options: Any) -> XloomError:
    """The error of an add, after checking that it changed nothing."""
    before, on_disk = catalog.manifest, prepared(catalog._prepared.parent.parent)
    with pytest.raises(XloomError) as caught:
        catalog.add(name, str(source), **options)
    assert catalog.manifest == before
    assert prepared(catalog._prepared.parent.parent) == on_disk
    assert not list(catalog._incoming.iterdir())
    return caught.value


def test_an_adapter_is_prepared_under_its_generation_and_survives_a_restart(open_catalog: Open, lora: Path) -> None:
    entry = open_catalog().add("code", str(lora))
    assert (entry.kind, entry.rank, entry.source) == ("lora", 4, str(lora))
    assert entry.targets == tuple(sorted(ATTENTION))
    again = open_catalog()
    files = again.files(entry.generation)
    assert again.entries() == (entry,)
    assert generation_of(files) == entry.generation
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert entry.size == sum(map(len, files.values()))


def test_a_bundle_is_recognised_and_stacked_with_its_overrides(open_catalog: Open, bundle: Path) -> None:
    catalog = open_catalog()
    entry = catalog.add("blend", str(bundle), overrides=Overrides(2, None, "gated"))
    assert (entry.kind, entry.overrides) == ("xlora", Overrides(2, None, "gated"))
    files = catalog.files(entry.generation)
    routing = json.loads(files["xlora.json"])["routing"]
    assert (routing["top_k"], routing["mixing_mode"]) == (2, "gated")
    assert "xlora_router.safetensors" in files


def test_overrides_are_part_of_a_bundles_generation(open_catalog: Open, bundle: Path) -> None:
    catalog = open_catalog()
    generations = {
        catalog.add("a", str(bundle)).generation,
        catalog.add("b", str(bundle), overrides=Overrides(top_k=1)).generation,
        catalog.add("c", str(bundle), overrides=Overrides(temperature=0.5)).generation,
    }
    assert len(generations) == 3


@pytest.mark.parametrize("how", ["relative", "absolute"])
def test_a_bundle_may_name_adapters_beside_it(open_catalog: Open, base: Path, tmp_path: Path, how: str) -> None:
    blend = tiny_bundle(tmp_path / "source" / "blend", base)
    config = json.loads((blend / "adapter_config.json").read_text())
    for number in config["adapters"]:
        moved = tmp_path / "source" / "adapters" / f"a{number}"
        moved.parent.mkdir(exist_ok=True)
        (blend / number).rename(moved)
        config["adapters"][number] = str(moved) if how == "absolute" else f"../adapters/a{number}"
    (blend / "adapter_config.json").write_text(json.dumps(config))
    catalog = open_catalog()
    entry = catalog.add("blend", str(blend))
    names = json.loads(catalog.files(entry.generation)["xlora.json"])["adapter_names"]
    assert names == ["a0", "a1", "a2"]
    if how == "relative":
        memory = fsspec.filesystem("memory")
        memory.put(str(tmp_path / "source"), "/bucket", recursive=True)
        try:
            assert catalog.add("remote", "memory://bucket/blend").generation == entry.generation
        finally:
            memory.rm("/bucket", recursive=True)


def test_a_bundle_may_not_reach_further(open_catalog: Open, base: Path, tmp_path: Path) -> None:
    blend = tiny_bundle(tmp_path / "source" / "blend", base)
    config = json.loads((blend / "adapter_config.json").read_text())
    shutil.rmtree(blend / "0")
    for path in ("../../secret", "../../prepared/x", "0/../../.."):
        config["adapters"]["0"] = path
        (blend / "adapter_config.json").write_text(json.dumps(config))
        assert refused(open_catalog(), "blend", blend).code == "unsafe_path"


def test_a_remote_bundle_may_not_name_local_folders(open_catalog: Open, base: Path, lora: Path, tmp_path: Path) -> None:
    blend = tiny_bundle(tmp_path / "source" / "blend", base)
    config = json.loads((blend / "adapter_config.json").read_text())
    shutil.rmtree(blend / "0")
    config["adapters"]["0"] = str(lora)
    (blend / "adapter_config.json").write_text(json.dumps(config))
    memory = fsspec.filesystem("memory")
    memory.put(str(blend), "/bucket/blend", recursive=True)
    try:
        assert refused(open_catalog(), "blend", "memory://bucket/blend").code == "broken_bundle"
    finally:
        memory.rm("/bucket", recursive=True)


def test_adding_the_same_again_changes_nothing(open_catalog: Open, lora: Path) -> None:
    catalog = open_catalog()
    first = catalog.add("code", str(lora))
    version = catalog.version
    assert catalog.add("code", str(lora)) == first
    assert catalog.version == version


def test_other_content_needs_replace_and_then_hides_the_old(
    open_catalog: Open, lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    catalog = open_catalog()
    old = catalog.add("code", str(lora))
    error = refused(catalog, "code", other_lora)
    assert (error.code, error.status) == ("adapter_exists", 409)
    new = catalog.add("code", str(other_lora), replace=True)
    assert new.generation != old.generation
    with pytest.raises(XloomError) as caught:
        catalog.files(old.generation)
    assert caught.value.code == "generation_not_found"
    assert prepared(tmp_path) == {old.generation, new.generation}
    catalog.remove("code")
    assert prepared(tmp_path) == set()


def test_a_replacement_can_be_undone(open_catalog: Open, lora: Path, other_lora: Path, tmp_path: Path) -> None:
    catalog = open_catalog()
    old = catalog.add("code", str(lora))
    new = catalog.add("code", str(other_lora), replace=True)
    assert catalog.revert("code", old.generation) is None  # no longer what is there
    assert catalog.revert("code", new.generation) == new
    assert catalog.entries() == (old,)
    assert prepared(tmp_path) == {old.generation}
    assert catalog.files(old.generation)


def test_undoing_a_first_add_removes_it(open_catalog: Open, lora: Path, tmp_path: Path) -> None:
    catalog = open_catalog()
    entry = catalog.add("code", str(lora))
    assert catalog.revert("code", entry.generation) == entry
    assert catalog.entries() == ()
    assert prepared(tmp_path) == set()


def test_a_new_process_keeps_nothing_to_go_back_to(
    open_catalog: Open, lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    catalog = open_catalog()
    catalog.add("code", str(lora))
    new = catalog.add("code", str(other_lora), replace=True)
    assert open_catalog().entries() == (new,)
    assert prepared(tmp_path) == {new.generation}


def test_files_stay_until_the_last_name_is_removed(open_catalog: Open, lora: Path, tmp_path: Path) -> None:
    catalog = open_catalog()
    generation = catalog.add("one", str(lora)).generation
    assert catalog.add("two", str(lora)).generation == generation
    catalog.remove("one")
    assert prepared(tmp_path) == {generation}
    catalog.remove("two")
    assert prepared(tmp_path) == set()
    with pytest.raises(XloomError) as caught:
        catalog.remove("two")
    assert (caught.value.code, caught.value.status) == ("adapter_not_found", 404)


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../b", "a//b", "/a", "a/", "a/b/c", "a/.b", "", ".hidden", "x" * 65, "a b", "a\n", "a@b", "naïve"],
)
def test_names_with_path_parts_and_the_like_are_refused(open_catalog: Open, lora: Path, name: str) -> None:
    error = refused(open_catalog(), name, lora)
    assert (error.code, error.status) == ("invalid_adapter_name", 400)


def test_the_base_models_name_is_reserved(open_catalog: Open, lora: Path) -> None:
    assert refused(open_catalog(), "base", lora).code == "name_reserved"


def test_a_rank_over_the_limit_is_refused(open_catalog: Open, lora: Path, bundle: Path) -> None:
    catalog = open_catalog(max_rank=3)
    assert refused(catalog, "code", lora).code == "rank_too_large"
    # Each of the bundle's adapters fits, their stack does not.
    assert refused(open_catalog(max_rank=8), "blend", bundle).code == "rank_too_large"


def test_an_adapter_of_another_base_is_refused(open_catalog: Open, base: Path, tmp_path: Path) -> None:
    deeper = tiny_model(tmp_path / "deeper", "llama", num_layers=3)
    error = refused(open_catalog(), "code", tiny_adapter(tmp_path / "lora", deeper))
    assert error.code == "wrong_base"
    assert "layers.2" in error.message


def test_a_wrong_shape_is_named_with_what_was_expected(open_catalog: Open, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    shutil.copytree(lora, tmp_path / "lora")
    save_file(tensors | {key: tensors[key][:, :-1].contiguous()}, tmp_path / "lora" / "adapter_model.safetensors")
    error = refused(open_catalog(), "code", tmp_path / "lora")
    assert error.code == "wrong_shape"
    assert all(part in error.message for part in ("model.layers.0.self_attn.q_proj", "64", "63"))


@pytest.mark.parametrize("damage", ["truncated", "noise", "no config", "config not JSON", "weights missing"])
def test_a_malformed_adapter_is_refused_by_its_own_name(
    open_catalog: Open, lora: Path, tmp_path: Path, damage: str
) -> None:
    source = tmp_path / "lora"
    shutil.copytree(lora, source)
    weights, config = source / "adapter_model.safetensors", source / "adapter_config.json"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "noise":
            weights.write_bytes(b"\x80\x04pickle" * 10)
        case "no config":
            config.unlink()
        case "config not JSON":
            config.write_text("{")
        case "weights missing":
            weights.unlink()
    error = refused(open_catalog(), "code", source)
    assert error.code == "broken_adapter"
    assert str(source) in error.message
    assert "incoming" not in error.message


def test_pickled_weights_are_refused(open_catalog: Open, lora: Path, tmp_path: Path) -> None:
    source = tmp_path / "lora"
    shutil.copytree(lora, source)
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    assert refused(open_catalog(), "code", source).code == "pickle_refused"


def test_kinds_are_told_apart(open_catalog: Open, lora: Path, bundle: Path) -> None:
    assert refused(open_catalog(), "code", lora, kind="xlora").code == "wrong_kind"
    assert refused(open_catalog(), "blend", bundle, kind="lora").code == "wrong_kind"
    assert refused(open_catalog(), "code", lora, overrides=Overrides(top_k=1)).code == "invalid_override"
    assert refused(open_catalog(), "blend", bundle, overrides=Overrides(top_k=9)).code == "invalid_override"


def test_a_source_over_the_limits_is_refused(open_catalog: Open, lora: Path) -> None:
    assert refused(open_catalog(), "code", lora, rules=SourceRules(limits=Limits(size=10))).code == "source_too_large"


def test_a_full_disk_while_committing_changes_nothing(
    open_catalog: Open, lora: Path, other_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = open_catalog()
    catalog.add("code", str(lora))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalog._file, "save", full)
    assert refused(catalog, "docs", other_lora).code == "store_unwritable"
    assert [entry.name for entry in open_catalog().entries()] == ["code"]


def test_what_a_crash_left_behind_is_cleared(open_catalog: Open, lora: Path, tmp_path: Path) -> None:
    generation = open_catalog().add("code", str(lora)).generation
    (tmp_path / "store/incoming/half").mkdir()
    (tmp_path / "store/prepared" / ("0" * 64)).mkdir()
    open_catalog()
    assert prepared(tmp_path) == {generation}
    assert not list((tmp_path / "store/incoming").iterdir())


def test_an_entry_whose_files_are_gone_is_dropped_and_the_others_stay(
    open_catalog: Open, lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    catalog = open_catalog()
    gone = catalog.add("gone", str(lora))
    kept = catalog.add("kept", str(other_lora))
    version = catalog.version
    shutil.rmtree(tmp_path / "store/prepared" / gone.generation)
    again = open_catalog()
    assert again.entries() == (kept,)
    assert again.version > version


def test_damaged_files_are_not_handed_out(open_catalog: Open, lora: Path, tmp_path: Path) -> None:
    catalog = open_catalog()
    entry = catalog.add("code", str(lora))
    (tmp_path / "store/prepared" / entry.generation / "adapter_config.json").write_text("{}")
    with pytest.raises(XloomError) as caught:
        catalog.files(entry.generation)
    assert caught.value.code == "generation_damaged"


def test_damaged_files_are_fetched_again_from_their_source(open_catalog: Open, lora: Path, tmp_path: Path) -> None:
    catalog = open_catalog()
    entry = catalog.add("code", str(lora))
    whole = catalog.files(entry.generation)
    file = tmp_path / "store/prepared" / entry.generation / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    catalog.mend(entry.generation)
    assert catalog.files(entry.generation) == whole
    shutil.rmtree(file.parent)
    with pytest.raises(XloomError) as caught:
        catalog.files(entry.generation)
    assert caught.value.code == "generation_damaged"
    catalog.mend(entry.generation)
    assert catalog.files(entry.generation) == whole
    assert catalog.entries() == (entry,)


def test_a_source_that_is_another_by_now_mends_nothing(
    open_catalog: Open, lora: Path, other_lora: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(lora, tmp_path / "source")
    catalog = open_catalog()
    entry = catalog.add("code", str(source))
    (tmp_path / "store/prepared" / entry.generation / "adapter_config.json").write_text("{}")
    for changed in (other_lora, None):
        shutil.rmtree(source)
        if changed is not None:
            shutil.copytree(changed, source)
        with pytest.raises(XloomError) as caught:
            catalog.mend(entry.generation)
        assert caught.value.code == "generation_damaged"
        assert str(source) in caught.value.message
    assert catalog.entries() == (entry,)


def test_files_are_fetched_again_under_the_rules_they_were_added_under(
    open_catalog: Open, lora: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(lora, tmp_path / "allowed" / "code")
    catalog = open_catalog()
    entry = catalog.add("code", str(source), rules=SourceRules((str(tmp_path / "allowed"),)))
    shutil.rmtree(tmp_path / "store/prepared" / entry.generation)
    shutil.rmtree(source)
    source.symlink_to(lora)
    with pytest.raises(XloomError, match="does not take adapters from") as caught:
        catalog.mend(entry.generation)
    assert caught.value.code == "generation_damaged"


def test_adding_what_is_there_mends_its_damaged_files(open_catalog: Open, lora: Path, tmp_path: Path) -> None:
    catalog = open_catalog()
    entry = catalog.add("code", str(lora))
    whole = catalog.files(entry.generation)
    (tmp_path / "store/prepared" / entry.generation / "adapter_config.json").write_text("{}")
    assert catalog.add("code", str(lora)) == entry
    assert catalog.files(entry.generation) == whole


def test_an_unreadable_base_model_is_an_error_of_its_own(tmp_path: Path, lora: Path) -> None:
    catalog = AdapterCatalog(tmp_path / "store", str(tmp_path / "nothing"), 64)
    assert refused(catalog, "code", lora).code == "unreadable_model"


def test_the_catalog_imports_without_ray_vllm_or_torch() -> None:
    check = "import sys, xloom.adapters.catalog; print(sorted({'ray', 'vllm', 'torch'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_what_is_to_be_verified_stays_so(open_catalog: Open, lora: Path) -> None:
    catalog = open_catalog()
    assert catalog.add("code", str(lora), verify=True, max_rank=64).verify
    assert catalog.add("code", str(lora), max_rank=64).verify
    [entry] = open_catalog().entries()
    assert entry.verify


def test_engines_that_hold_an_adapter_unproved_can_not_be_asked_to_prove_it(open_catalog: Open, lora: Path) -> None:
    catalog = open_catalog()
    catalog.add("code", str(lora), max_rank=64)
    error = refused(catalog, "code", lora, verify=True, replace=True, max_rank=64)
    assert error.code == "adapter_exists"


@pytest.mark.parametrize("verify", [True, False])
def test_before_engines_run_the_settings_say_what_is_verified(open_catalog: Open, lora: Path, verify: bool) -> None:
    catalog = open_catalog()
    first = catalog.add("code", str(lora), verify=not verify)
    second = catalog.add("code", str(lora), replace=True, verify=verify)
    assert (second.generation, second.verify) == (first.generation, verify)
    assert catalog.entries() == (second,)


def test_two_adapters_that_engines_could_not_tell_apart_are_never_taken_in_together(
    open_catalog: Open, lora: Path
) -> None:
    catalog = open_catalog()
    generation = catalog.add("first", str(lora)).generation  # the same content has the same generation
    names: dict[int, str] = {}
    for count in range(1_000_000):  # about 60,000 are enough for two of 31 bits to meet
        name = f"a{count}"
        other = names.setdefault(adapter_number(adapter_key(name, generation)), name)
        if other != name:
            break
    catalog.add(other, str(lora))
    error = refused(catalog, name, str(lora))
    assert (error.code, error.status) == ("adapter_number_taken", 409)
    assert other in error.message
    catalog.remove(other)
    catalog.add(name, str(lora))


def test_bundles_are_refused_where_engines_run_without_mixtures(open_catalog: Open, bundle: Path, lora: Path) -> None:
    catalog = open_catalog()
    for name, source, code in (("blend", bundle, "unsupported_by_backend"), ("code", lora, "")):
        with catalog.stage(name, str(source), None, Overrides()) as staged:
            if not code:
                assert catalog.commit(staged, mixtures=False).name == name
                continue
            with pytest.raises(XloomError, match=name) as caught:
                catalog.commit(staged, mixtures=False)
            assert caught.value.code == code


def test_what_left_the_settings_file_goes_and_what_was_added_at_run_time_stays(open_catalog: Open, lora: Path) -> None:
    catalog = open_catalog()
    for name, configured in (("kept", True), ("left", True), ("added", False), ("claimed", False)):
        catalog.add(name, str(lora), configured=configured)
    catalog.add("kept", str(lora), replace=True, max_rank=64)  # again, at run time: still the file's
    catalog.add("claimed", str(lora), configured=True)  # the file names it from now on
    assert [entry.name for entry in open_catalog().prune(["kept", "claimed"])] == ["left"]
    catalog = open_catalog()
    assert [entry.name for entry in catalog.entries()] == ["kept", "added", "claimed"]
    assert [entry.name for entry in catalog.prune([])] == ["kept", "claimed"]
    assert catalog.prune([]) == []


def test_the_weights_of_one_source_at_a_time_are_in_memory(
    open_catalog: Open, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xloom.mixtures import prepare

    catalog, read, met, both = open_catalog(), prepare.prepare_lora, [], Barrier(2)

    def reading(*arguments: Any, **options: Any) -> Any:
        with suppress(BrokenBarrierError):
            both.wait(1)
            met.append(1)
        return read(*arguments, **options)

    monkeypatch.setattr(prepare, "prepare_lora", reading)
    with ThreadPoolExecutor(2) as pool:
        adding = [pool.submit(catalog.add, name, str(lora)) for name in ("code", "law")]
        assert [each.result().name for each in adding] == ["code", "law"]
    assert not met
