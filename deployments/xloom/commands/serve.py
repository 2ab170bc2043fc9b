"""`xloom serve`: a deployment, from its settings to Ctrl-C."""

from __future__ import annotations

from pathlib import Path

from xloom.protocol import XloomError
from xloom.settings import Settings, load_settings


def chosen_settings(file: Path | None, port: int | None) -> Settings:
    """The settings file, or the sample's, with the port given on the command line."""
    settings = load_settings(file)
    if port is None:
        return settings
    return settings.model_copy(update={"router": settings.router.model_copy(update={"port": port})})


def serve(file: Path | None, port: int | None) -> int:
    """Serve until interrupted. Raises `XloomError`."""
    settings = chosen_settings(file, port)
    try:
        from xloom.app import serve_forever  # late: the other commands run without Ray
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("xloom"):
            raise
        raise XloomError(
            "missing_package",
            f"Serving needs the package {error.name!r}, which is not installed.",
            "Run `make install`, or `xloom doctor` for all that is missing.",
        ) from None
    serve_forever(settings)
    return 0
