"""The tally of what mixtures' gates were, in the one rank that keeps it."""

from __future__ import annotations

# Relied on: the rank that each worker has set up before it makes the model; vllm.distributed, vLLM 0.32.
from vllm.distributed import get_tensor_model_parallel_rank

from xloom.mixtures.tally import MixtureTally

_tallies: list[MixtureTally] = []  # of this process's model


def tally_of_this_rank(device: str) -> MixtureTally | None:
    """A new tally for this process's model. All ranks have the same gates, so the first alone keeps one."""
    _tallies[:] = [MixtureTally(device)] if get_tensor_model_parallel_rank() == 0 else []
    return current_tally()


def current_tally() -> MixtureTally | None:
    """The tally of this process, if it keeps one."""
    return _tallies[0] if _tallies else None
