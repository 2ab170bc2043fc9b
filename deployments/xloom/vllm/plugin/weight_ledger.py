"""Which of a model's weights its checkpoint gave, and which of the checkpoint's nobody took.

vLLM 0.32 looks for the first by the names that a model says it has loaded, and where it does, it leaves out all linears
and embeddings; a fused linear counts as loaded with the first of its parts. What is not loaded stays as memory was. So
the weights are filled with a pattern beforehand, and nothing may hold it afterwards.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xloom.protocol import some_of

logger = logging.getLogger(__name__)

# By bytes a value; as 16-bit, 32-bit and 8-bit floats none of them is a number, and no checkpoint holds these.
PATTERNS = {
    1: (torch.int8, 0x7F),
    2: (torch.int16, 0x7FAD),
    4: (torch.int32, 0x7FC0DEAD),
    8: (torch.int64, 0x7FC0DEAD7FC0DEAD),
}
# Parameters of quantised linears that every checkpoint has; scales of inputs, zero points and the like may be absent.
QUANTISED = ("weight", "weight_packed", "qweight", "weight_scale", "weight_scale_inv", "scales", "bias")
LINES = 64  # that look unwritten, of which so many are looked at whole
NEVER_TAKEN = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.(masked_)?bias$")


@dataclass
class Watched:
    """A parameter that the checkpoint should fill."""

    name: str
    module: nn.Module
    parameter: Tensor
    before: Tensor | None  # of one that vLLM may have made as it should be
    experts: bool = False

    @property
    def kind(self) -> str:
        """What it has in common with those of other layers."""
        return re.sub(r"\d+", "*", self.name)


def watch(model: nn.Module, *, quantised: bool) -> list[Watched]:
    """Fill the parameters of a new model with the patterns."""
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    found, seen = [], set()
    for place, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, BaseKVCacheMethod) or getattr(method, "uses_meta_device", False):
            continue  # scales with defaults; weights that are quantised as they are loaded
        experts = isinstance(method, FusedMoEMethodBase)
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.numel() or parameter.is_meta:
                continue
            seen.add(id(parameter))
            if quantised and method is not None and (experts or own not in QUANTISED):
                continue
            before = parameter.data.clone() if method is None else None
            bits, pattern = _bits(parameter)
            bits.fill_(pattern)
            found.append(Watched(f"{place}.{own}" if place else own, module, parameter, before, experts))
    return found


def _bits(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor's values as integers of as many bytes, and the pattern."""
    dtype, pattern = PATTERNS[tensor.element_size()]
    data = tensor.data
    return (data.real.contiguous().view(dtype) if data.is_complex() else data.view(dtype)), pattern


def unwritten(watched: Iterable[Watched], loaded: set[str] | None, packed: dict[str, list[str]]) -> list[str]:
    """Names of what the checkpoint did not give, those of a fused linear's parts by `packed_modules_mapping`.

    `loaded` is what the model says it has loaded. What vLLM made itself, and no checkpoint holds, is as it was again.
    """
    missing, written, own = [], set(), []
    for each in watched:
        if each.experts:
            missing += _unwritten_experts(each)
            continue
        rows = _unwritten_rows(each.parameter)
        if rows is None:
            written.add(each.kind)
        elif each.before is None:
            missing += _named(each, rows, packed)
        else:
            own.append(each)
    for each in own:
        if loaded is not None or each.kind in written:
            missing.append(each.name)
        else:
            assert each.before is not None
            each.parameter.data.copy_(each.before)
            logger.warning("%s is not in the checkpoint: it stays as vLLM made it", each.name)
    return missing


def _unwritten_rows(parameter: Tensor) -> list[int] | None:
    """Rows that still hold the pattern, some of them where they are many; [] for columns; None where all is written."""
    bits, pattern = _bits(parameter)
    lines = bits.reshape(-1, bits.shape[-1]) if bits.dim() > 1 else bits.reshape(-1, 1)
    rows = ((lines[:, 0] == pattern) & (lines[:, -1] == pattern)).nonzero()[:, 0]
    found = [row for row in _spread(rows) if bool((lines[row] == pattern).all())]
    if found:
        return found
    columns = ((lines[0] == pattern) & (lines[-1] == pattern)).nonzero()[:, 0]
    return [] if any(bool((lines[:, column] == pattern).all()) for column in _spread(columns)) else None


def _spread(indices: Tensor) -> list[int]:
    """At most LINES of them, from the first to the last."""
    if len(indices) > LINES:
        indices = indices[torch.linspace(0, len(indices) - 1, LINES, device=indices.device).long()]
    return [int(index) for index in indices]


def _named(each: Watched, rows: list[int], packed: dict[str, list[str]]) -> list[str]:
    """The parts of a fused linear in which the rows are, by their own names; else the parameter's name."""
    place, _, own = each.name.rpartition(".")
    parent, _, kind = place.rpartition(".")
    parts, sizes = packed.get(kind, []), getattr(each.module, "output_partition_sizes", [])
    if len(parts) < 2 or len(parts) != len(sizes) or sum(sizes) != each.parameter.shape[0] or not rows:
        return [each.name]
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    inside = sorted({next(number for number, end in enumerate(ends) if row < end) for row in rows})
    return [".".join(filter(None, (parent, parts[number], own))) for number in inside]


def _unwritten_experts(each: Watched) -> list[str]:
    """Experts of which nothing, or not one of two halves, is written; padding, which no checkpoint fills, becomes 0."""
    bits, pattern = _bits(each.parameter)
    missing = []
    for number, expert in enumerate(bits):
        rest = expert == pattern
        halves = rest.chunk(2) if expert.dim() > 1 and expert.shape[0] % 2 == 0 else (rest,)
        if any(bool(half.all()) for half in halves):
            missing.append(f"{each.name} of expert {number}")
        elif bool(rest.any()):
            expert[rest] = 0
    return missing


class Taken(TorchDispatchMode):
    """While open, sees which of the tensors that are handed to a model any operation reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pending: dict[int, str] = {}  # by address, which the next tensor may be given
        self._left: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor) and not tensor.is_meta:
                    self._pending.pop(tensor.data_ptr(), None)
        return func(*args, **(kwargs or {}))

    def handed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, each noted."""
        for name, tensor in weights:
            if tensor.numel():
                before = self._pending.pop(tensor.data_ptr(), None)
                self._left += [before] if before is not None else []
                self._pending[tensor.data_ptr()] = name
            yield name, tensor

    def left_out(self, *, tied: bool) -> list[str]:
        """Names of what no operation has read, but for what is known to be of no use; a tied head is its embedding."""
        names = [*self._left, *self._pending.values()]
        return [
            name for name in names if not NEVER_TAKEN.search(name) and not (tied and name.endswith("lm_head.weight"))
        ]


def with_ledger(original: Callable[..., None]) -> Callable[..., None]:
    """`DefaultModelLoader.load_weights`, which refuses a model that its checkpoint does not fill; vLLM 0.32.

    Relied on: its `get_all_weights`, `model.load_weights` giving the names loaded or None,
    `model.packed_modules_mapping`. A model loaded again, and a draft, which shares layers with its model, are left to
    vLLM. Raises `ValueError`.
    """

    @functools.wraps(original)
    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        if model_config.runner_type == "draft" or hasattr(model, "xloom_filled"):
            return original(self, model, model_config)
        watched = watch(model, quantised=model_config.quantization is not None)
        taken, loaded = Taken(), []
        all_weights, load = self.get_all_weights, model.load_weights

        def load_and_keep(weights: Any) -> Any:
            found = load(weights)
            loaded.append(None if found is None else set(found))
            return found

        self.get_all_weights = lambda *args: taken.handed(all_weights(*args))
        model.load_weights = load_and_keep
        try:
            with taken:
                original(self, model, model_config)
        finally:
            del self.get_all_weights, model.load_weights
        names = loaded[0] if loaded else None
        missing = unwritten(watched, names, getattr(model, "packed_modules_mapping", {}))
        if missing:
            raise ValueError(
                f"{len(missing)} of the model's weights were not initialized from its checkpoint, which lacks them: "
                f"{some_of(missing)}"
            )
        tied = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        if extra := taken.left_out(tied=tied):
            logger.warning("%d tensors of the checkpoint have no place in the model: %s", len(extra), some_of(extra))
        model.xloom_filled = True
        return None

    return load_weights
