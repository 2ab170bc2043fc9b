"""The model that `xloom chat` and `xloom generate` were told of: an endpoint's, or one in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from xloom.commands.endpoint import Endpoint
from xloom.commands.local import LocalModel
from xloom.commands.remote import RemoteModel
from xloom.commands.text_model import TextModel
from xloom.protocol import XloomError
from xloom.settings import load_settings


@contextmanager
def opened(settings: Path | None, url: str | None, key: str | None, model: str | None) -> Iterator[TextModel]:
    """The endpoint at `url`, else the settings' model (or the sample's) in this process, ready to answer as `model`.

    Progress is shown on stderr. Raises `XloomError`.
    """
    if url is not None and settings is not None:
        message = f"{settings} and --url name two models."
        raise XloomError("two_models", message, "Leave out one of them: an endpoint has settings of its own.")
    source: TextModel
    if url is not None:
        source = RemoteModel(Endpoint(url, key))
    else:
        source = LocalModel(load_settings(settings))
    name = source.named(model)
    try:
        with Console(stderr=True).status(f"Loading {escape(name)}"):
            source.prepare(name)
        yield source
    finally:
        source.close()
