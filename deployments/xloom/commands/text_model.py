"""What `xloom chat` and `xloom generate` ask of a model, be it in this process or behind a URL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from xloom.protocol import XloomError

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
