"""The course of a proof: what is asked of an engine, in which order, and what the reference is asked afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.engines.base import LLMBackend
from xloom.mixtures.routing.base import Source
from xloom.mixtures.routing.registry import read_description
from xloom.protocol import AdapterRef, XloomError
from xloom.verification.engine import Ask, one_by_one, together
from xloom.verification.judgement import Expected, Observed

if TYPE_CHECKING:
    from xloom.verification.loading import LoadedReference

NEW_TOKENS = 16  # of an answer
CHEAP = 2_000_000_000  # parameters up to which the reference also says what wrong gates would look like

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """An adapter or mixture to be proved, and the prepared folder it is loaded from."""

    ref: AdapterRef
    folder: Path

    @property
    def name(self) -> str:
        return self.ref.name

    @property
    def num_adapters(self) -> int:
        """How many adapters a router mixes in it; 0: none, be it that it is plain or has one row a token."""
        found = read_description(self.folder)
        return int(found[1]["num_adapters"]) if found is not None and found[0].source is Source.HIDDEN else 0


def mixtures(targets: Iterable[Target]) -> dict[str, int]:
    """The mixtures among them, each with its number of adapters."""
    return {target.name: count for target in targets if (count := target.num_adapters)}


def empty(targets: Iterable[Target]) -> set[str]:
    """Those whose files change nothing. Raises `XloomError` as reading them does."""
    from xloom.verification.plain_model import changes_something

    return {target.name for target in targets if not changes_something(target.folder)}


async def observe(
    backend: LLMBackend, ask: Ask, targets: Sequence[Target], prompts: Sequence[Sequence[int]], progress: Progress
) -> Observed:
    """Load the targets into an engine that holds none of them, and take down its answers. Raises `XloomError`."""
    progress("the base model")
    observed = Observed(await one_by_one(ask, prompts, None, NEW_TOKENS))
    for target in targets:
        progress(f"loading {target.name}")
        try:
            await backend.add_adapter(target.ref, target.folder)
        except XloomError as error:
            observed.refused[target.name] = error
    loaded = [target.ref for target in targets if target.name not in observed.refused]
    if not loaded:
        return observed
    progress("the base model beside adapters")
    observed.base_after = await one_by_one(ask, prompts, None, NEW_TOKENS)
    for ref in loaded:
        progress(ref.name)
        observed.alone[ref.name] = await one_by_one(ask, prompts, ref, NEW_TOKENS)
    progress("all in one batch")
    observed.base_mixed, *mixed = await together(ask, prompts, [None, *loaded], NEW_TOKENS)
    observed.mixed = {ref.name: answers for ref, answers in zip(loaded, mixed, strict=True)}
    return observed


async def observe_eager(
    backend: LLMBackend,
    ask: Ask,
    targets: Sequence[Target],
    prompts: Sequence[Sequence[int]],
    observed: Observed,
    progress: Progress,
) -> None:
    """The same questions to a second engine, which does not compile."""
    progress("the base model, eagerly")
    observed.eager[None] = await one_by_one(ask, prompts, None, NEW_TOKENS)
    for target in targets:
        if target.name in observed.alone:
            progress(f"{target.name}, eagerly")
            await backend.add_adapter(target.ref, target.folder)
            observed.eager[target.name] = await one_by_one(ask, prompts, target.ref, NEW_TOKENS)


def expect(
    reference: LoadedReference,
    targets: Sequence[Target],
    prompts: Sequence[Sequence[int]],
    observed: Observed,
    progress: Progress,
) -> Expected:
    """What the reference says of the same prompts and of the answers that the engine gave to them."""
    model = reference.model
    all_faults = reference.place.device == "cuda" or reference.parameters <= CHEAP
    progress("the base model, in plain torch")
    expected = Expected([model.scores(prompt, a.tokens) for prompt, a in zip(prompts, observed.base, strict=True)])
    for target in targets:
        if target.name not in observed.alone:
            continue
        progress(f"{target.name}, in plain torch")
        try:
            folder = reference.prepared(target.folder)
            right, wrong = model.served(prompts, observed.alone[target.name], folder, all_faults=all_faults)
        except XloomError as error:
            expected.broken[target.name] = str(error)
            continue
        expected.right[target.name] = right
        expected.wrong[target.name] = dict(wrong)
    return expected
