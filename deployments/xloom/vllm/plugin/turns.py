"""Decoding pairs take turns together: all scaling sequences in one step, all their requests in the next.

A step of scaling sequences alone is one of the base model: without LoRA, and with nothing to sample.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.request import Request

from xloom.vllm.plugin.pairs import MixtureRequest, running


class Turns:
    """Who waits in this step, so that a pair falls in with the others. Nobody waits twice in a row."""

    def __init__(self) -> None:
        self._waiting: set[str] = set()

    def choose(self, mixtures: Iterable[MixtureRequest]) -> None:
        """Look at the pairs at the beginning of a step: the fewer wait."""
        due: tuple[list[Request], list[Request]] = ([], [])
        for mixture in mixtures:
            if running(mixture) and running(mixture.scaling):
                tokens = mixture.num_tokens + mixture.num_output_placeholders
                if mixture.num_computed_tokens == tokens - 1:  # else it is in its prompt, or done
                    first = mixture.scaling.num_computed_tokens == tokens - 1
                    due[not first].append(mixture.scaling if first else mixture)
        fewer = min(due, key=len)
        self._waiting = {request.request_id for request in fewer} - self._waiting

    def waits(self, request: Request) -> bool:
        """Whether it is not its turn."""
        return request.request_id in self._waiting
