"""Decoding pairs take turns together: all scaling sequences in one step, all their requests in the next.

A step of scaling sequences alone is one of the base model: without LoRA, and with nothing to sample.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.request import Request

from xloom.vllm.plugin.pairs import MixtureRequest, running

SETTLED, LOOK_AGAIN = 4, 32  # steps: then they are looked at now and then, as a full budget may part them again


class Turns:
    """Who waits in this step, so that a pair falls in with the others. Nobody waits twice in a row."""

    def __init__(self) -> None:
        self._waiting: set[str] = set()
        self._settled = 0  # steps in which all were together

    def unsettle(self) -> None:
        """A pair has come that may be out of step."""
        self._settled = 0

    def choose(self, mixtures: Iterable[MixtureRequest]) -> None:
        """Look at the pairs at the beginning of a step: the fewer wait."""
        if self._settled > SETTLED and self._settled % LOOK_AGAIN:
            self._settled += 1
            return
        due: tuple[list[Request], list[Request]] = ([], [])
        for mixture in mixtures:
            if running(mixture) and running(mixture.scaling):
                tokens = mixture.num_tokens + mixture.num_output_placeholders
                if mixture.num_computed_tokens == tokens - 1:  # else it is in its prompt, or done
                    first = mixture.scaling.num_computed_tokens == tokens - 1
                    due[not first].append(mixture.scaling if first else mixture)
        fewer = min(due, key=len)
        self._waiting = {request.request_id for request in fewer} - self._waiting
        self._settled = 0 if fewer else self._settled + 1

    def waits(self, request: Request) -> bool:
        """Whether it is not its turn."""
        return request.request_id in self._waiting
