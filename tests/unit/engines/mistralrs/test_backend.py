"""The mistral.rs backend on the real engine: what is its own. What every backend must do is in tests/conformance/."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.models import VOCAB, tiny_model
from xloom.engines.mistralrs import backend as module
from xloom.engines.mistralrs.backend import MistralRsBackend
from xloom.protocol import TokenChunk, TokenRequest, XloomError
from xloom.settings import SAMPLE, EngineSettings, IsqSettings, ModelSettings

needs_the_wheel = pytest.mark.skipif(MistralRsBackend.missing() is not None, reason="mistralrs is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


@asynccontextmanager
async def served(source: Path, isq: IsqSettings | None = None, **settings: Any) -> AsyncIterator[MistralRsBackend]:
    engine = EngineSettings(**({"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4} | settings))
    backend = await MistralRsBackend.load(
        ModelSettings(source=str(source)), engine, xlora=False, max_lora_rank=32, isq=isq
    )
    try:
        yield backend
    finally:
        await backend.close()


async def generate(backend: MistralRsBackend, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    """The tokens of some requests at once, greedy."""
    options = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | sampling
    for number, prompt in enumerate(prompts):
        await backend.submit(TokenRequest(str(number), prompt, options))
    found: list[list[int]] = [[] for _ in prompts]
    left = len(prompts)
    async with asyncio.timeout(60):
        async for step in backend.steps():
            for chunk in step:
                found[int(chunk.request_id)] += chunk.token_ids
                left -= chunk.finish_reason is not None
            if not left:
                return found
    raise AssertionError("the steps ended")


def test_without_the_wheel_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'xloom[mistralrs]'" in (MistralRsBackend.missing() or "")


@needs_the_wheel
def test_it_runs_where_torch_is_not_installed() -> None:
    code = """
import asyncio, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "numpy", "vllm", "ray"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
from xloom.engines.mistralrs.backend import MistralRsBackend
from xloom.protocol import TokenRequest
from xloom.settings import EngineSettings, ModelSettings

async def main():
    backend = await MistralRsBackend.load(ModelSettings(), EngineSettings(), xlora=False, max_lora_rank=8)
    await backend.submit(TokenRequest("r", [0, 5, 6], {"temperature": 0.0, "max_tokens": 1}))
    async for step in backend.steps():
        print(step[0].finish_reason)
        break

asyncio.run(main())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "length\n"), ran.stderr


@needs_the_wheel
async def test_every_token_can_go_in_and_come_out(tmp_path: Path) -> None:
    async with served(tiny_model(tmp_path / "model", "llama")) as backend:
        prompt = [token for token in range(VOCAB) if token % 2][:140]  # specials and half characters among them
        (tokens,) = await generate(backend, [prompt], temperature=2.0, max_tokens=100)
        assert len(tokens) == 100
        assert len(set(tokens)) > 20
        assert all(0 <= token < VOCAB for token in tokens)


@needs_the_wheel
@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "gemma2", "phi3"])
async def test_other_architectures_give_their_own_tokens(architecture: str, tmp_path: Path) -> None:
    from tests.models import load_model, peft_greedy

    model = tiny_model(tmp_path / "model", architecture)
    draw = random.Random(0)
    prompts = [draw.choices(range(256), k=length) for length in (1, 5, 20, 40)]  # none of them makes near ties
    async with served(model) as backend:
        oracle = load_model(model)
        assert await generate(backend, prompts, max_tokens=8) == [peft_greedy(oracle, prompt, 8) for prompt in prompts]


@needs_the_wheel
async def test_the_models_own_end_of_text_ends_a_request() -> None:
    async with served(SAMPLE / "base") as backend:
        # <|begin|><|user|>...: the sample answers sums in a few tokens and closes with <|end|>, token 1
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "base")
        prompt = tokenizer("<|begin|><|user|>What is 3 + 4?<|end|><|assistant|>", add_special_tokens=False).input_ids
        (tokens,) = await generate(backend, [prompt], ignore_eos=False, max_tokens=100)
        assert tokens.index(1) == len(tokens) - 1
        assert backend.stats().running == 0


@needs_the_wheel
async def test_quantised_weights_stay_near_the_models_own_the_more_bits_the_nearer() -> None:
    prompts = [[0, *range(100 + 7 * number, 120 + 9 * number)] for number in range(8)]
    async with served(SAMPLE / "base") as backend:
        exact = await generate(backend, prompts)

    async def agreement(bits: Any) -> float:
        async with served(SAMPLE / "base", IsqSettings(method="rtn", bits=bits)) as quantised:
            found = await generate(quantised, prompts)
        same = [[a == b for a, b in zip(mine, theirs, strict=True)].index(False) if mine != theirs else len(mine)
                for mine, theirs in zip(found, exact, strict=True)]  # fmt: skip
        return sum(same) / sum(map(len, exact))

    eight, four, two = await agreement(8), await agreement(4), await agreement(2)
    assert eight > 0.6
    assert eight > four >= two


@needs_the_wheel
async def test_xlora_and_several_devices_are_refused() -> None:
    model = ModelSettings(source=str(SAMPLE / "base"))
    with pytest.raises(XloomError) as caught:
        await MistralRsBackend.load(model, EngineSettings(), xlora=True, max_lora_rank=8)
    assert caught.value.code == "unsupported_by_backend"
    with pytest.raises(XloomError) as caught:
        await MistralRsBackend.load(model, EngineSettings(tensor_parallel_size=2), xlora=False, max_lora_rank=8)
    assert caught.value.code == "unsupported_setting"


@needs_the_wheel
async def test_arguments_it_does_not_know_are_refused() -> None:
    with pytest.raises(XloomError) as caught:
        async with served(SAMPLE / "base", extra_args={"no_such_argument": 1}):
            pass
    assert caught.value.code == "unknown_engine_argument"


@needs_the_wheel
async def test_a_cache_salt_is_refused() -> None:
    async with served(SAMPLE / "base") as backend:
        with pytest.raises(XloomError) as caught:
            await backend.submit(TokenRequest("r", [5], {}, cache_salt="mine"))
        assert caught.value.code == "unsupported_setting"


@needs_the_wheel
async def test_a_request_that_fails_inside_ends_with_an_error_and_leaves_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(text: str) -> list[int]:
        raise ValueError("not in the alphabet")

    async with served(SAMPLE / "base") as backend:
        with monkeypatch.context() as patched:
            patched.setattr(module, "tokens_of", broken)
            await backend.submit(TokenRequest("r", [5, 6], {"max_tokens": 4}))
            chunks: list[TokenChunk] = []
            async with asyncio.timeout(30):
                async for step in backend.steps():
                    chunks += step
                    break
        assert [chunk.finish_reason for chunk in chunks] == ["error"]
        assert backend.stats().running == 0
        assert len((await generate(backend, [[5, 6]]))[0]) == 16


@needs_the_wheel
async def test_an_engine_that_makes_no_token_for_long_is_unwell(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(SAMPLE / "base") as backend:
        await backend.check_health()
        monkeypatch.setattr(module, "STUCK_S", -1.0)
        await backend.check_health()  # idle: nothing is owed
        await backend.submit(TokenRequest("r", [5] * 200, {"max_tokens": 50}))
        with pytest.raises(XloomError) as caught:
            await backend.check_health()
        assert caught.value.code == "engine_dead"
