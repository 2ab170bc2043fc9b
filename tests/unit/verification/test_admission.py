"""`verify: true` in a replica: what passes is loaded, what does not is refused with its reason and not left loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from tests.faulty import FaultyTransformers
from tests.models import HIDDEN, tiny_adapter, tiny_bundle, tiny_model
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.protocol import AdapterRef, TokenRequest, XloomError
from xloom.replica.server import ReplicaServer
from xloom.settings import Settings, parse_settings
from xloom.verification import admission
from xloom.verification.admission import Admission


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared: an adapter, one without effect, and a mixture."""
    folder = tmp_path_factory.mktemp("admission")
    base = tiny_model(folder / "base", "llama")
    modules = linear_modules(str(base))
    prepare_lora(tiny_adapter(folder / "code", base, seed=7), modules, folder / "prepared/code", max_rank=64)
    prepare_lora(tiny_adapter(folder / "zero", base, strength=0), modules, folder / "prepared/zero", max_rank=64)
    bundle = tiny_bundle(folder / "blend", base, seed=3)
    prepare_bundle(bundle, modules, folder / "prepared/blend", hidden_size=HIDDEN, max_rank=64)
    return folder


def settings_of(folder: Path) -> Settings:
    engine = {"dtype": "float32", "max_model_len": 256, "extra_args": {"device": "cpu"}, "enable_xlora": True}
    return parse_settings({"model": {"source": str(folder / "base")}, "engine": engine})


class Replica:
    """An engine, its server, and what it admits."""

    def __init__(self, backend: FaultyTransformers, settings: Settings, folder: Path) -> None:
        self.backend, self._folder = backend, folder
        self.server = ReplicaServer(backend, "replica", "secret")
        self.server.begin()
        self._admission = Admission(backend, self.server.own.ask, settings)

    async def admit(self, name: str) -> AdapterRef:
        """Admit an adapter named after its fault, if any, and its source."""
        source = name.rpartition("-")[2]
        ref = AdapterRef(name, "1", "xlora" if source == "blend" else "lora")
        await self._admission.admit(ref, self._folder / "prepared" / source)
        return ref

    async def refusal(self, name: str) -> XloomError:
        """The error of one that is not admitted."""
        with pytest.raises(XloomError) as caught:
            await self.admit(name)
        return caught.value

    @property
    def loaded(self) -> list[str]:
        return self.backend.stats().adapters


@pytest.fixture
async def replica(folder: Path) -> AsyncIterator[Replica]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = settings_of(folder)
    backend = await FaultyTransformers.load(settings.model, settings.engine, xlora=True, max_lora_rank=64)
    made = Replica(backend, settings, folder)
    yield made
    await made.server.close()
    await backend.close()
    torch.set_num_threads(threads)


async def test_what_is_right_is_admitted_and_nothing_else_stays_loaded(replica: Replica) -> None:
    for name in ("code", "blend"):
        await replica.admit(name)
    assert sorted(replica.loaded) == ["blend@1", "code@1"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("zero", "Its files change nothing"),
        ("scaled-code", "not what its files say"),
        ("silent-code", "as the base model does"),
        ("summed-blend", "the plain sum of its adapters"),
    ],
)
async def test_what_is_wrong_is_refused_with_its_reason(replica: Replica, name: str, reason: str) -> None:
    error = await replica.refusal(name)
    assert (error.code, error.status) == ("adapter_not_verified", 400)
    assert reason in error.message
    assert replica.loaded == []


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("code", False),
        ("blend", False),
        ("scaled-code", False),  # what only a reference tells: `xloom check` does
        ("zero", True),
        ("silent-code", True),
        ("summed-blend", True),
    ],
)
async def test_beside_a_model_too_large_for_a_reference_the_engine_is_compared_with_itself(
    replica: Replica, name: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "REFERENCE_BYTES", 1000)
    if refused:
        assert (await replica.refusal(name)).code == "adapter_not_verified"
    else:
        await replica.admit(name)
    assert replica.loaded == ([] if refused else [f"{name}@1"])


async def test_an_adapter_the_engine_does_not_take_keeps_its_own_code(replica: Replica, folder: Path) -> None:
    with pytest.raises(XloomError) as caught:
        await replica._admission.admit(AdapterRef("gone", "1", "lora"), folder / "prepared" / "gone")
    assert caught.value.code != "adapter_not_verified"


async def test_it_is_proved_while_the_replica_serves(replica: Replica) -> None:
    async def serve(number: int) -> int:
        sampling = {"max_tokens": 24, "ignore_eos": True, "temperature": 0.0}
        chunks = await replica.server.own.ask(TokenRequest(f"other-{number}", [5, 6, 7 + number], sampling))
        return sum(len(chunk.token_ids) for chunk in chunks)

    served, *_ = await asyncio.gather(asyncio.gather(*map(serve, range(8))), replica.admit("code"))
    assert served == [24] * 8
    assert replica.loaded == ["code@1"]
