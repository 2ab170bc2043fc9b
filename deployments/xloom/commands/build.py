"""`xloom build`: the file that `serve deploy` and a KubeRay RayService take, from a settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from xloom.app import APP_NAME
from xloom.observability.logs import serve_logging
from xloom.protocol import XloomError
from xloom.settings import Settings, load_settings
from xloom.settings_file import without_variables

IMPORT_PATH = "xloom.app:application"


def build_config(settings: Settings) -> dict[str, Any]:
    """Ray Serve's configuration of a deployment (`ServeDeploySchema`, Ray 2.60), the settings as its arguments.

    Raises `XloomError` (secret_in_settings): what is written lies about in files and in the cluster's dashboard.
    """
    args: dict[str, Any] = without_variables(settings.model_dump(mode="json", exclude_unset=True))
    router = args.get("router", {})
    for name in ("api_key", "admin_key"):
        if router.pop(name, None) is not None:
            raise XloomError(
                "secret_in_settings",
                f"router.{name} would be written down in clear.",
                f"Leave it out and set XLOOM_{name.upper()} where Ray runs.",
            )
    return {
        # The router listens itself: see router/deployment.py.
        "proxy_location": "Disabled",
        "logging_config": serve_logging(settings.observability.logs),
        "applications": [{"name": APP_NAME, "route_prefix": None, "import_path": IMPORT_PATH, "args": args}],
    }


def write_config(file: Path | None, out: Path | None) -> int:
    """Print the configuration of a settings file, or write it. Raises `XloomError`."""
    # Not parsed with the environment's keys: they stay where they are.
    text = yaml.safe_dump(build_config(load_settings(file, with_keys=False)), sort_keys=False)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    return 0
