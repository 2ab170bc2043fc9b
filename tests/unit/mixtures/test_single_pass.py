"""Routing in one pass: where gates begin, and the reference against a model that computes each token once, in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import load_model, tiny_bundle
from xloom.mixtures.hooks import Span, adapted
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.reference import Reference
from xloom.mixtures.single_pass import segment_end
from xloom.protocol import Overrides

PROMPT = [72, 17, 203, 5, 140, 99, 7, 250, 31, 64, 12]
NEW_TOKENS = 6


def beginnings(count: int, sent: int, prefill: str) -> list[int]:
    found = [0]
    while found[-1] < count:
        found.append(segment_end(found[-1], sent, prefill))
    return found


@pytest.mark.parametrize(
    ("sent", "prefill", "expected"),
    [
        (100, "lagged", [0, 1, 2, 4, 8, 16, 32, 64, 96, 100, 101, 102, 103]),
        (5, "lagged", [0, 1, 2, 4, 5, 6, 7]),
        (64, "lagged", [0, 1, 2, 4, 8, 16, 32, 64, 65, 66]),
        (2, "exact", [0, 1, 2, 3]),
    ],
)
def test_where_gates_begin(sent: int, prefill: str, expected: list[int]) -> None:
    assert beginnings(expected[-1], sent, prefill) == expected


def test_a_segment_ends_where_it_does_from_wherever_one_looks() -> None:
    ends = beginnings(300, 217, "lagged")[1:]
    for position in range(300):
        assert segment_end(position, 217, "lagged") == next(end for end in ends if end > position)


def reference(llama: Path, folder: Path, prefill: str, scaling_pass_value: float) -> Reference:
    bundle = tiny_bundle(folder / "bundle", llama, seed=3, depth=2, scaling_pass_value=scaling_pass_value)
    overrides = Overrides(routing_passes=1, prefill=prefill)
    prepare_bundle(
        bundle, linear_modules(str(llama)), folder / "prepared", hidden_size=64, max_rank=64, overrides=overrides
    )
    return Reference.load(load_model(llama), folder / "prepared")


@torch.no_grad()
def in_order(found: Reference, prefill: str) -> list[int]:
    """Greedy tokens with the model's own cache, each position computed once with the gates of the one before it."""
    model, routing, modules = found.model, found.routing, dict(found.model.named_modules())
    constant = routing.scaling_pass_gates()[None]
    ids, cache, tokens = torch.tensor([PROMPT]), None, list[int]()
    hidden = None
    if prefill == "exact":
        with adapted(modules, [Span(slice(None), found.bundle, constant.expand(len(PROMPT), -1, -1))]):
            scaling = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        pieces = [(0, len(PROMPT), routing.gates(scaling))]
    else:
        ends = [end for end in (1, 2, 4, 8, 16) if end < len(PROMPT)] + [len(PROMPT)]
        pieces = [(first, end, constant) for first, end in zip([0, *ends], ends, strict=False)]
    for first, end, gates in pieces:
        if hidden is not None:
            gates = routing.gates(hidden[-1:])
        with adapted(modules, [Span(slice(None), found.bundle, gates.expand(end - first, -1, -1))]):
            out = model(input_ids=ids[:, first:end], past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache, hidden = out.past_key_values, out.hidden_states[-1][0]
    while True:
        tokens.append(int(out.logits[0, -1].argmax()))
        if len(tokens) == NEW_TOKENS:
            return tokens
        with adapted(modules, [Span(slice(None), found.bundle, routing.gates(hidden[-1:]))]):
            out = model(
                input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True, output_hidden_states=True
            )
        cache, hidden = out.past_key_values, out.hidden_states[-1][0]


@pytest.mark.parametrize("scaling_pass_value", [0.0, 0.3])
@pytest.mark.parametrize("prefill", ["exact", "lagged"])
def test_the_reference_computes_each_token_with_the_gates_of_the_one_before(
    llama: Path, tmp_path: Path, prefill: str, scaling_pass_value: float
) -> None:
    found = reference(llama, tmp_path, prefill, scaling_pass_value)
    tokens = found.greedy(PROMPT, NEW_TOKENS)
    assert tokens == in_order(found, prefill)
    # An answer that goes on elsewhere has the gates it had, and other ones than as a prompt.
    ids = PROMPT + tokens
    going_on = found.logits(ids[:-2], len(PROMPT))
    torch.testing.assert_close(found.logits(ids, len(PROMPT))[: len(ids) - 2], going_on, atol=1e-4, rtol=1e-4)
    assert (found.logits(ids)[len(PROMPT) :] - found.logits(ids, len(PROMPT))[len(PROMPT) :]).abs().max() > 1e-3
