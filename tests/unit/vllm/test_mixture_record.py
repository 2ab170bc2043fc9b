"""What an answer says of its gates, from the chunks it came in."""

from __future__ import annotations

import numpy as np
import pytest

from xloom.protocol import Gates
from xloom.vllm.front_end.mixture_record import MixtureRecord

NAMES = ["code", "docs"]


def rows(*values: tuple[float, float]) -> bytes:
    return np.array(values, np.float32).tobytes()


def test_means_are_over_the_tokens_there_were_when_the_answer_ended() -> None:
    record = MixtureRecord("arrow", 10, None)
    first = record.add(Gates(rows((0.5, 0.5)), b"", rows((0.1, 0.9)), 6, NAMES))
    second = record.add(Gates(rows((1.0, 0.0))))
    record.add(Gates(rows((0.0, 1.0))))  # past a stop string, which is found late
    assert first.told("blend")["gates"] == {"code": 0.5, "docs": 0.5}
    assert second.told("blend") == {
        "name": "blend",
        "routing": "arrow",
        "adapters": NAMES,
        "gates": {"code": 0.75, "docs": 0.25},
        "prompt_gates": {"code": 0.1, "docs": 0.9},
        "tokens": 2,
        "prompt_tokens": 6,
        "cached_prompt_tokens": 3,
    }
    assert record.tokens == []


def test_a_replica_that_goes_on_changes_nothing_of_the_prompt() -> None:
    record = MixtureRecord("xlora", 3, "tokens")
    record.add(Gates(rows((0.5, 0.5)), b"", b"", 0, NAMES))
    mixed = record.add(Gates(rows((0.25, 0.75)), b"", rows((9.0, 9.0)), 3, NAMES))
    told = mixed.told("blend")
    assert told["prompt_gates"] is None
    assert (told["prompt_tokens"], told["cached_prompt_tokens"]) == (0, 2)
    assert told["token_gates"] == [[0.5, 0.5], [0.25, 0.75]]


def test_layers_without_linears_have_no_gates() -> None:
    record = MixtureRecord("linear", 1, "layers")
    record.add(Gates(rows((0.5, 0.5)), rows((0.2, 0.8), (np.nan, np.nan), (0.7, 0.3)), b"", 0, NAMES))
    told = record.add(Gates(rows((1.0, 0.0)), rows((0.4, 0.6), (np.nan, np.nan), (1.0, 0.0)))).told("blend")
    assert told["layer_gates"] == [[[0.2, 0.8], None, [0.7, 0.3]], [[0.4, 0.6], None, [1.0, 0.0]]]
    assert told["cached_prompt_tokens"] == 0


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_chunk_may_hold_several_tokens(tokens: int) -> None:
    record = MixtureRecord("fixed", 1, "layers")
    data = rows(*[(float(number), 0.0) for number in range(tokens)])
    told = record.add(Gates(data, data, b"", 0, NAMES)).told("blend")
    assert told["token_gates"] == [[number, 0] for number in range(tokens)]
    assert told["layer_gates"] == [[[number, 0]] for number in range(tokens)]
