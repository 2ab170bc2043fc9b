"""The files of cluster/: settings that parse, and launcher files that Ray's own validation takes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from xloom.commands.build import build_config
from xloom.commands.checks import PYTHONS
from xloom.protocol import XloomError
from xloom.settings import load_settings, parse_settings

FOLDER = Path(__file__).parents[3] / "cluster"
LAUNCHERS = ("on-premises", "aws", "gcp")
SETTINGS = ("local", "gpu")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


def test_each_file_is_one_of_these() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*LAUNCHERS, *SETTINGS}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_takes_the_launcher_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_starts_ray_as_engines_need_it(name: str) -> None:
    found = read(name)
    for part in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_worker_niceness=0" in found[part][-1]
        assert "RAY_AUTH_MODE=token" in found[part][-1]
        assert "XLOOM_API_KEY" not in found[part][-1]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_gives_every_node_the_token_and_xlooms_python(name: str) -> None:
    found = read(name)
    assert [local for remote, local in found["file_mounts"].items() if remote.endswith("/.ray/auth_token")]
    [path] = [line for line in found["setup_commands"] if "~/.bashrc" in line]
    [folder] = re.findall(r'PATH="\$HOME/(\S+)/bin:\$PATH"', path)
    starts = [*found["head_start_ray_commands"], *found["worker_start_ray_commands"]]
    assert all(f"~/{folder}/bin/ray " in line for line in starts)


@pytest.mark.parametrize("name", SETTINGS)
def test_serve_takes_what_is_built_from_the_settings(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = build_config(load_settings(FOLDER / f"{name}.yaml", with_keys=False))
    ServeDeploySchema.model_validate(config)
    [application] = config["applications"]
    assert parse_settings(application["args"], with_keys=False) == load_settings(
        FOLDER / f"{name}.yaml", with_keys=False
    )


def test_a_key_in_the_settings_is_not_written_down() -> None:
    with pytest.raises(XloomError) as caught:
        build_config(parse_settings({"router": {"admin_key": "hush"}}))
    assert caught.value.code == "secret_in_settings"
    assert "XLOOM_ADMIN_KEY" in caught.value.cure
    assert "hush" not in str(caught.value)


CLOUDS = ("aws", "gcp")


@pytest.mark.parametrize("name", CLOUDS)
def test_a_clouds_python_is_that_of_its_image_and_one_xloom_takes(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert len(re.findall(r"ubuntu-2404|ubuntu/server/24\.04|ubuntu-24\.04", text)) >= 2  # the head's and the workers'
    assert not re.search(r"ubuntu-?2204|python3\.\d+ ", text)
    venv = [line for line in read(name)["setup_commands"] if "python3 -m venv" in line]
    assert venv
    assert "python3-venv" in read(name)["setup_commands"][0]
    assert PYTHONS[0] <= (3, 12) <= PYTHONS[1]  # Ubuntu 24.04's


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    ("driver", "enough"), [("580.95.05", True), ("590.1", True), ("550.54.15", False), ("", False)]
)
def test_a_clouds_driver_is_looked_at_before_ray_starts(name: str, driver: str, enough: bool, tmp_path: Path) -> None:
    [check] = read(name)["worker_setup_commands"]
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ '{driver}' ] && echo '{driver}'\n")
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", check], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is enough
    assert ("vLLM needs 580 or later" in done.stderr) is not enough


def test_the_gpu_settings_name_no_folder_that_somebody_must_make() -> None:
    """The launchers mount nothing, and their user may write to its home and /tmp alone."""
    store = load_settings(FOLDER / "gpu.yaml", with_keys=False).store
    for path in (store.path, store.cache):
        assert path.startswith(("~/", "/tmp/"))
