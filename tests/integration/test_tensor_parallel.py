"""X-LoRA over two tensor-parallel ranks: the same tokens as PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..models import ADAPTERS, peft_greedy, peft_lora, peft_xlora, tiny_adapter, tiny_bundle, tiny_model
from .harness import Engine

PROMPT = list(range(40, 75))
NEW_TOKENS = 12


def test_two_ranks_give_pefts_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both ranks may share a core here; on a real machine each is given its own.
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    model = tiny_model(tmp_path / "model", "llama")
    bundle = tiny_bundle(tmp_path / "bundle", model, seed=3, depth=2, top_k=2)
    adapter = tiny_adapter(tmp_path / "adapter", model, seed=9, **ADAPTERS[0])
    engine = Engine(model, tensor_parallel_size=2)
    try:
        mixed = engine.start(PROMPT, engine.bundle("blend", bundle, tmp_path / "blend"), max_tokens=NEW_TOKENS)
        plain = engine.start(PROMPT, engine.adapter("plain", adapter, tmp_path / "plain"), max_tokens=NEW_TOKENS)
        answers = mixed.result(180).tokens, plain.result(180).tokens
    finally:
        engine.close()
    assert answers[0] == peft_greedy(peft_xlora(model, bundle), PROMPT, NEW_TOKENS)
    assert answers[1] == peft_greedy(peft_lora(model, adapter), PROMPT, NEW_TOKENS)
