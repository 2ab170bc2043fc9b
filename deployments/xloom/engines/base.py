"""`LLMBackend`: what a replica asks of an engine, whatever library runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xloom.engines.kinds import checked
from xloom.protocol import AdapterRef, EngineStats, MixtureFigures, TokenChunk, TokenRequest, XloomError

if TYPE_CHECKING:
    from xloom.settings import EngineSettings, IsqSettings, ModelSettings

Device = Literal["cpu", "cuda", "metal"]
IsqCase = tuple[str, int]  # method and bits


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; settings are refused against it before anything loads."""

    paged_attention: bool
    xlora: tuple[Device, ...]  # where it serves X-LoRA mixtures
    devices: tuple[Device, ...]
    isq: Mapping[Device, frozenset[IsqCase]] = field(default_factory=dict)
    single_pass: bool = False  # whether mixtures may be routed in one pass (`routing_passes: 1`)


class LLMBackend(ABC):
    """One engine in one process. All methods are called on one event loop.

    `steps` is the primitive: one list of chunks for each engine step, over all requests. It has one
    reader. Requests are submitted and aborted at any time.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Whoever adds a bundle to a backend without mixtures is refused: the backend itself need not look."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("add_adapter")
        if own is not None:
            cls.add_adapter = checked(own)  # type: ignore[method-assign,assignment]

    @classmethod
    @abstractmethod
    def capabilities(cls) -> Capabilities:
        """What this backend can do on any machine."""

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """None when the backend can run here, else what is missing and the command that mends it."""

    @classmethod
    def require(cls) -> None:
        """Raise `XloomError` (backend_missing) when the backend can't run here."""
        missing = cls.missing()
        if missing is not None:
            raise XloomError("backend_missing", missing, "", 500)

    @classmethod
    @abstractmethod
    def device(cls) -> Device:
        """What it would run on here. Quick: nothing heavy is imported."""

    @classmethod
    @abstractmethod
    async def load(
        cls,
        model: ModelSettings,
        engine: EngineSettings,
        *,
        xlora: bool,
        max_lora_rank: int,
        isq: IsqSettings | None = None,
    ) -> LLMBackend:
        """Start the engine with the model; with `xlora`, ready for X-LoRA bundles; with `isq`, its weights quantised.

        Raises `XloomError`.
        """

    @abstractmethod
    async def submit(self, request: TokenRequest) -> None:
        """Take a request; its chunks come through `steps`. Raises `XloomError` when it can't be taken."""

    @abstractmethod
    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests and free their pages; unknown ids are ignored. No chunk need follow."""

    @abstractmethod
    def steps(self) -> AsyncIterator[list[TokenChunk]]:
        """The chunks of each engine step. Ends, by an exception, only when the engine has died."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """The newest figures; cheap."""

    async def mixture(self) -> MixtureFigures | None:
        """What X-LoRA did since this was last asked; None for nothing, or from an engine that does not measure it."""
        return None

    @abstractmethod
    async def add_adapter(self, ref: AdapterRef, path: Path) -> None:
        """Load a prepared adapter or bundle from its folder, so that the next request finds it. Raises `XloomError`."""

    @abstractmethod
    async def remove_adapter(self, ref: AdapterRef) -> None:
        """Free the adapter's slot. Unknown ones are ignored."""

    @abstractmethod
    async def check_health(self) -> None:
        """Raise when the engine is dead or stuck."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine and its processes."""
