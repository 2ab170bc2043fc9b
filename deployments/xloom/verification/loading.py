"""The reference's model: where it fits, and loaded there, quantised ones as the floats their weights stand for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from xloom.protocol import XloomError
from xloom.quantization.fitting import GIB, available_memory
from xloom.quantization.model_cache import DONE_FILE

if TYPE_CHECKING:
    from xloom.engines.base import Device
    from xloom.quantization.folding import Folding
    from xloom.settings import IsqSettings, ModelSettings
    from xloom.verification.plain_model import PlainModel

MARGIN = 1.25  # on the weights: activations, and what loading takes on top


@dataclass(frozen=True)
class Place:
    """Where the reference runs, and in what."""

    device: str  # cuda or cpu
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} on {self.device}"


def choose_place(parameters: int, own_dtype: str, *, gpu: int | None, memory: int | None) -> Place | None:
    """The first that fits, of bytes free on a GPU (None: there is none) and in memory (None: unknown).

    float32 comes before `own_dtype`, the model's own: half precision at most doubles the base's distance, and the
    tolerance follows that. None: it fits nowhere.
    """
    sizes = {"float32": 4, own_dtype: 4 if own_dtype == "float32" else 2}
    for device, free in (("cuda", gpu), ("cpu", memory)):
        if free is None and device == "cuda":
            continue
        for dtype, size in sizes.items():
            if free is None or parameters * size * MARGIN <= free:
                return Place(device, dtype)
    return None


@dataclass
class LoadedReference:
    """A model in plain torch, and how its engine's adapters are changed for it."""

    model: PlainModel
    place: Place
    parameters: int
    folding: Folding | None = None
    _folder: TemporaryDirectory[str] | None = None

    def prepared(self, folder: Path) -> Path:
        """A prepared adapter as this base needs it: rescaled, where quantising folded scales into the weights."""
        if self.folding is None:
            return folder
        from xloom.quantization.folding import rescale

        self._folder = self._folder or TemporaryDirectory(prefix="xloom-reference-")
        return rescale(folder, Path(self._folder.name) / folder.name, self.folding)

    def close(self) -> None:
        """Remove what was written."""
        if self._folder is not None:
            self._folder.cleanup()


def load_reference(
    model: ModelSettings, isq: IsqSettings | None, device: Device, ranks: int = 1, *, most_bytes: int | None = None
) -> LoadedReference:
    """The base model of an engine on `device` with `ranks` of tensor parallelism, in plain torch.

    With `most_bytes` it runs on the CPU and takes no more. Raises `XloomError` (no_reference, model_not_loadable).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from xloom.verification.plain_model import PlainModel

    if isq is not None:
        model = _quantised(model, isq, device, ranks)
    try:
        config = AutoConfig.from_pretrained(model.source, revision=model.revision, trust_remote_code=False)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(_plain(config))
        parameters = sum(parameter.numel() for parameter in shape.parameters())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise no_reference(f"{model.source} can't be read in plain torch: {error}") from None
    ours = (Path(model.source) / DONE_FILE).is_file()
    if getattr(config, "quantization_config", None) is not None and not ours:
        raise no_reference(f"{model.source} is quantised in a form that only engines read.")
    own = str(getattr(config.get_text_config(), "dtype", None) or "float32").removeprefix("torch.")
    gpu = None
    if most_bytes is None and not ours and torch.cuda.is_available():
        torch.cuda.empty_cache()  # what an engine of this process has left
        gpu = int(torch.cuda.mem_get_info()[0])
    memory = available_memory()
    if most_bytes is not None:
        memory = most_bytes if memory is None else min(memory, most_bytes)
    place = choose_place(parameters, "float32" if ours else own, gpu=gpu, memory=memory)
    if place is None:
        size = parameters * 2 * MARGIN / GIB
        raise no_reference(f"A reference of {parameters / 1e9:.1f} billion parameters takes {size:.0f} GiB or more.")
    if ours:
        from xloom.quantization.checkpoint import load_dequantised
        from xloom.quantization.folding import read_folding

        folder = Path(model.source)
        return LoadedReference(PlainModel(load_dequantised(folder)), place, parameters, read_folding(folder))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.source,
            revision=model.revision,
            dtype=getattr(torch, place.dtype),
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise no_reference(f"{model.source} can't be loaded in plain torch: {error}") from None
    return LoadedReference(PlainModel(loaded.to(place.device).eval(), place.device), place, parameters)


def _plain(config: Any) -> Any:
    """A configuration whose model is built without what quantises it."""
    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    return plain


def _quantised(model: ModelSettings, isq: IsqSettings, device: Device, ranks: int) -> ModelSettings:
    from xloom.quantization.quantise import quantised

    if isq.bits == "auto":
        raise no_reference("isq.bits is auto: what the engine chose at its start is not known here.")
    return quantised(model, isq, device, ranks=ranks)  # from the cache, where the engine had it from


def no_reference(why: str) -> XloomError:
    """There is nothing to compare an engine with."""
    return XloomError("no_reference", why, "What needs no reference is compared all the same.", 500)
