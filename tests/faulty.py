"""Backends that serve an adapter wrongly, by its name: what `xloom check` and `verify: true` have to find."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import msgspec
from safetensors.torch import load_file, save_file

from xloom.engines.base import LLMBackend
from xloom.engines.transformers.backend import TransformersBackend
from xloom.mixtures.options import ROUTER_FILE, XLORA_FILE
from xloom.protocol import AdapterRef, TokenRequest
from xloom.vllm.engine.backend import VLLMBackend

WEIGHTS = "adapter_model.safetensors"
_COPIES = tempfile.TemporaryDirectory(prefix="xloom-faulty-")  # an engine may read one again at any time


def doctored(prepared: Path, fault: str) -> Path:
    """A copy of a prepared folder: one module's B scaled, all B zero, or a mixture without its router."""
    copy = Path(tempfile.mkdtemp(dir=_COPIES.name))
    shutil.copytree(prepared, copy, dirs_exist_ok=True)
    tensors = load_file(copy / WEIGHTS)
    keys = sorted(key for key in tensors if ".lora_B." in key)
    if fault == "scaled":
        tensors[keys[-1]] = tensors[keys[-1]] * 1.5
    elif fault == "silent":
        tensors |= {key: tensors[key] * 0 for key in keys}
    elif fault == "summed":
        (copy / XLORA_FILE).unlink(missing_ok=True)
        (copy / ROUTER_FILE).unlink(missing_ok=True)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    return copy


class Faulty(LLMBackend):
    """`scaled-x`, `silent-x` and `summed-x` are served with the fault they are named after; all others rightly."""

    async def add_adapter(self, ref: AdapterRef, path: Path) -> None:
        fault = ref.name.partition("-")[0]
        if fault in ("scaled", "silent", "summed"):
            path = doctored(path, fault)
        await super().add_adapter(served_as(ref), path)  # type: ignore[safe-super]

    async def submit(self, request: TokenRequest) -> None:
        if request.adapter is not None:
            request = msgspec.structs.replace(request, adapter=served_as(request.adapter))
        await super().submit(request)  # type: ignore[safe-super]

    async def remove_adapter(self, ref: AdapterRef) -> None:
        await super().remove_adapter(served_as(ref))  # type: ignore[safe-super]


def served_as(ref: AdapterRef) -> AdapterRef:
    """A mixture with its gates off is a plain adapter to the engine."""
    return AdapterRef(ref.name, ref.generation, "lora") if ref.name.startswith("summed-") else ref


class FaultyVLLM(Faulty, VLLMBackend):
    """vLLM, faulty."""


class FaultyTransformers(Faulty, TransformersBackend):
    """transformers, faulty."""
