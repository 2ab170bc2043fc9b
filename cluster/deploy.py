#!/usr/bin/env python3
"""Deploy a settings file on the Ray cluster this runs on: what `ray submit` and `ray job submit` start.

The deployment stays when this ends; keys come from the cluster's environment (XLOOM_API_KEY, XLOOM_ADMIN_KEY).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from xloom.commands.build import build_config
from xloom.observability.logs import serve_logging
from xloom.protocol import XloomError
from xloom.settings import load_settings


def deploy(file: Path | None, wait_s: float, console: Console) -> str:
    """Deploy, and wait until a replica can answer; returns what is served and where. Raises `XloomError`."""
    settings = load_settings(file, with_keys=False)
    [described] = build_config(settings)["applications"]
    import ray
    from ray import serve

    from xloom.app import application
    from xloom.start import start

    ray.init(address="auto", namespace="xloom", logging_level="ERROR")
    serve.start(proxy_location="Disabled", logging_config=serve_logging(settings.observability.logs))
    console.print(f"Deploying {settings.model.source}", highlight=False)
    port = start(application(described["args"]), settings, timeout_s=wait_s)
    names = [settings.model.served_name, *settings.names]
    return f"Serving {', '.join(names)} at port {port} of the nodes with a router."


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: ray job submit --working-dir cluster -- python deploy.py local.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="?", type=Path, metavar="SETTINGS", help="YAML file (default: the sample)")
    parser.add_argument("--wait", type=float, default=900, metavar="S", help="seconds to wait for a replica (900)")
    arguments = parser.parse_args()
    console = Console()
    try:
        console.print(deploy(arguments.settings, arguments.wait, console), highlight=False, soft_wrap=True)
    except XloomError as error:
        console.print(f"{error}", style="red", markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
