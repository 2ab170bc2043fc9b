"""Packed batches against the same model run on one sequence at a time, with attention as transformers computes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import (
    ADAPTERS,
    ARCHITECTURES,
    adapters_for,
    peft_logits,
    peft_lora,
    peft_xlora,
    tiny_adapter,
    tiny_bundle,
    tiny_model,
)
from xloom.engines.transformers.batch import ATTENTION, PACKED, BatchRunner, Part, packs
from xloom.mixtures.hooks import Adapter
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora

PROMPTS = [list(range(40, 75)), [256, 5, 9, 200], list(range(80, 250)), [7]]  # one beyond a window of 64
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing by more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param)


def load(folder: Path, attention: str) -> torch.nn.Module:
    # eager: transformers' sdpa leaves out the softcap of gemma2
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def run(
    runner: BatchRunner, prompts: list[list[int]], adapters: list[Adapter | None], pieces: int
) -> list[torch.Tensor]:
    """All logits of each prompt, fed to the batch in so many pieces each."""
    caches = [runner.caches(adapter) for adapter in adapters]
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    for piece in range(pieces):
        batch = []
        for number, prompt in enumerate(prompts):
            size = -(-len(prompt) // pieces)
            tokens = prompt[piece * size : (piece + 1) * size]
            if tokens:
                part = Part(tokens, piece * size, adapters[number], caches[number], all_logits=True)
                batch.append((number, part))
        for (number, _), logits in zip(batch, runner.run([part for _, part in batch]), strict=True):
            rows[number].append(logits)
    return [torch.cat(found) for found in rows]


def test_every_packed_architecture_is_tested(folder: Path) -> None:
    model = load(folder, "eager")
    assert packs(model.config)
    names = {"gemma3": "gemma3_text"}
    assert {names.get(name, name) for name in ARCHITECTURES} == PACKED


@pytest.mark.parametrize("pieces", [1, 3, 34])
def test_a_packed_batch_equals_sequences_alone(folder: Path, pieces: int) -> None:
    runner = BatchRunner(load(folder, ATTENTION), batching=True)
    plain = load(folder, "eager")
    found = run(runner, PROMPTS, [None] * len(PROMPTS), pieces)
    for prompt, logits in zip(PROMPTS, found, strict=True):
        torch.testing.assert_close(logits, peft_logits(plain, prompt), **TOLERANCE)


@pytest.mark.parametrize("batching", [True, False], ids=["packed", "one after another"])
def test_base_adapter_and_bundle_in_one_batch_equal_peft(folder: Path, tmp_path: Path, batching: bool) -> None:
    adapters = adapters_for(folder.name)
    linears = linear_modules(str(folder))
    source = tiny_adapter(tmp_path / "plain", folder, seed=9, **adapters[0])
    prepare_lora(source, linears, tmp_path / "plain-prepared", max_rank=64)
    bundle = tiny_bundle(tmp_path / "blend", folder, adapters=adapters, seed=3, scaling_pass_value=0.3, depth=2)
    prepare_bundle(
        bundle, linears, tmp_path / "blend-prepared", hidden_size=64, max_rank=64,
    )  # fmt: skip
    plain, blend = Adapter.load(tmp_path / "plain-prepared"), Adapter.load(tmp_path / "blend-prepared")
    runner = BatchRunner(load(folder, ATTENTION if batching else "eager"), batching=batching)

    kinds = [blend, None, plain, blend]
    found = run(runner, PROMPTS, kinds, pieces=3)

    oracles = {
        id(None): load(folder, "eager"),
        id(plain): peft_lora(folder, source),
        id(blend): peft_xlora(folder, bundle),
    }
    for oracle in (oracles[id(plain)], oracles[id(blend)]):
        oracle.base_model.model.set_attn_implementation("eager")
    for prompt, kind, logits in zip(PROMPTS, kinds, found, strict=True):
        torch.testing.assert_close(logits, peft_logits(oracles[id(kind)], prompt), **TOLERANCE)


def test_only_the_last_rows_logits_are_made_unless_all_are_wanted(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    runner = BatchRunner(load(folder, ATTENTION), batching=True)
    parts = [Part(PROMPTS[0], 0, None, runner.caches(None)), Part(PROMPTS[1], 0, None, runner.caches(None), True)]
    assert [len(rows) for rows in runner.run(parts)] == [1, len(PROMPTS[1])]


def test_an_adapter_on_the_head_reaches_its_own_rows(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    source = tiny_adapter(tmp_path / "head", folder, **(ADAPTERS[0] | {"targets": ("q_proj", "lm_head")}))
    prepare_lora(source, linear_modules(str(folder)), tmp_path / "prepared", max_rank=64)
    adapter = Adapter.load(tmp_path / "prepared")
    runner = BatchRunner(load(folder, ATTENTION), batching=True)
    parts = [Part(PROMPTS[0], 0, None, runner.caches(None)), Part(PROMPTS[1], 0, adapter, runner.caches(adapter))]
    base, adapted = runner.run(parts)
    torch.testing.assert_close(base[-1], peft_logits(load(folder, "eager"), PROMPTS[0])[-1], **TOLERANCE)
    torch.testing.assert_close(adapted[-1], peft_logits(peft_lora(folder, source), PROMPTS[1])[-1], **TOLERANCE)
