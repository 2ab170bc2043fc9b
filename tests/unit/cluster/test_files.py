"""The files of cluster/: settings that parse, and launcher files that Ray's own validation takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from xloom.commands.build import build_config
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
