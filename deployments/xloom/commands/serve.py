"""`xloom serve`: a deployment, from its settings to Ctrl-C."""

from __future__ import annotations

from pathlib import Path

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
    from xloom.launch import serve_forever  # late: the other commands run without Ray

    serve_forever(settings)
    return 0
