"""What `xloom chat` and `xloom generate` ask of a model, be it in this process or behind a URL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from xloom.protocol import XloomError
from xloom.settings import load_settings

MAX_TOKENS = 256

Message = dict[str, str]  # role and content


@dataclass(frozen=True)
class Options:
    """How an answer is drawn."""

    max_tokens: int = MAX_TOKENS
    temperature: float | None = None  # None: the model's own


def _nothing() -> Generator[str, None, None]:
    yield from ()


@dataclass
class Answer:
    """A text on its way: iterate over `pieces`, and close it; the rest is set once they have ended."""

    model: str
    pieces: Generator[str, None, None] = field(default_factory=_nothing)
    finish_reason: str | None = None
    num_tokens: int = 0


class TextModel(ABC):
    """A base model with its adapters and bundles, by name. Every failure is an `XloomError`."""

    names: list[str]
    default: str

    def named(self, name: str | None) -> str:
        """The name asked for, or the default. Raises `XloomError` (model_not_found)."""
        if name is None:
            return self.default
        if name not in self.names:
            cure = f"There are: {', '.join(self.names)}."
            raise XloomError("model_not_found", f"There is no model {name[:80]!r}.", cure, 404)
        return name

    @abstractmethod
    def prepare(self, model: str) -> None:
        """Load what answers of this model need, ahead of the first."""

    @abstractmethod
    def chat(self, messages: Sequence[Message], model: str, options: Options) -> Answer:
        """The answer to a conversation, through the model's chat template."""

    @abstractmethod
    def complete(self, prompt: str, model: str, options: Options) -> Answer:
        """The continuation of a text."""

    @abstractmethod
    def close(self) -> None:
        """Stop what was started."""


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
        from xloom.commands.endpoint import Endpoint
        from xloom.commands.remote import RemoteModel

        source = RemoteModel(Endpoint(url, key))
    else:
        from xloom.commands.local import LocalModel

        source = LocalModel(load_settings(settings))
    name = source.named(model)
    try:
        with Console(stderr=True).status(f"Loading {escape(name)}"):
            source.prepare(name)
        yield source
    finally:
        source.close()
