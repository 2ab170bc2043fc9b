"""Whether a quantised model is still its own base: the log-probabilities of a few texts, against what its bits explain.

What rounding costs depends on the model, so the yardstick is made of it: its weights rounded to the nearest at the same
bits and groups, in plain torch, which every method is meant to better or to equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from xloom.protocol import XloomError
from xloom.quantization.calibration import Texts, windows
from xloom.quantization.checkpoint import round_tokens
from xloom.quantization.feeding import logits
from xloom.quantization.recipes import Recipe

# Beside folding.safetensors: vLLM takes every safetensors file next to the weights for weights.
REFERENCE_FILE = "xloom/reference.safetensors"
WINDOWS, LENGTH = 4, 128  # texts, and tokens of each
FACTOR = 2.0  # of what plain rounding does
# What may always be, in nats: engines compute in 16 bits, and kernels round where the yardstick does not.
FLOOR = {8: 0.1, 4: 0.2, 2: 0.5}


@dataclass(frozen=True)
class Reference:
    """What a plain model makes of a few texts: `ids [rows, tokens]`, `logprobs [rows, tokens - 1]` from the second on.

    `limit` is how far a quantised form may be from them, in nats, root mean square.
    """

    ids: Tensor
    logprobs: Tensor
    limit: float

    def check(self, found: Tensor, what: str) -> float:
        """How far `found [rows, tokens - 1]` is. Raises `XloomError` (isq_not_its_base) where it is over the limit."""
        apart = distance(self.logprobs[:, : found.shape[1]], found)
        if not apart <= self.limit:  # NaN is over it
            raise XloomError(
                "isq_not_its_base",
                f"{what} is not its own base any more: its log-probabilities are {apart:.2f} apart from the plain "
                f"model's, root mean square, where rounding to as many bits explains {self.limit:.2f}.",
                "Use more isq.bits or another isq.method; where the quantised files are damaged, delete their folder.",
                500,
            )
        return apart


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the differences."""
    return float((one.float().cpu() - other.float().cpu()).square().mean().sqrt())


@torch.no_grad()
def token_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """The log-probabilities `[rows, tokens - 1]` a causal model gives the tokens of `ids [rows, tokens]`, on CPU."""
    rows = [logits(model, row[None])[0, :-1].log_softmax(-1) for row in ids]
    return torch.stack([row.cpu().gather(1, each[1:, None])[:, 0] for row, each in zip(rows, ids, strict=True)])


def reference_ids(texts: Texts, encode: Any, length: int = LENGTH) -> Tensor | None:
    """The beginnings of a few documents `[rows, tokens]`, which start as the tokeniser starts a text; None without."""
    rows: list[list[int]] = []
    for turn in range(max((len(domain) for domain in texts), default=0)):
        for domain in texts:
            if turn < len(domain) and len(rows) < WINDOWS and len(domain[turn]) >= length:
                row = list(encode(domain[turn][: 16 * length]))[:length]
                rows += [row] if len(row) == length else []
    if not rows:
        rows = [window for window in windows(texts, encode, 1, length) if len(window) > 1][:1]
    return torch.tensor(rows) if rows else None


def reference(
    model: nn.Module, ids: Tensor, recipe: Recipe, groups: Sequence[tuple[int, Sequence[str]]], ignore: Sequence[str]
) -> Reference:
    """The reference of a plain model that is about to be quantised; `groups` and `ignore` as in a `Job`."""
    plain = token_logprobs(model, ids)
    with rounded(model, recipe, groups, ignore):
        explained = distance(plain, token_logprobs(model, ids))
    return Reference(ids, plain, max(FLOOR[recipe.bits], FACTOR * explained))


@contextmanager
def rounded(
    model: nn.Module, recipe: Recipe, groups: Sequence[tuple[int, Sequence[str]]], ignore: Sequence[str]
) -> Iterator[None]:
    """While open, the model's linears run with their weights rounded to the nearest, one linear at a time."""
    handles: list[RemovableHandle] = []
    plain: dict[nn.Module, Tensor] = {}

    def before(module: Any, inputs: tuple[Any, ...], size: int) -> Any:
        plain[module] = module.weight.data
        module.weight.data = round_weight(plain[module], recipe, size)
        return None if recipe.activation_bits is None else (round_tokens(inputs[0]), *inputs[1:])

    def after(module: Any, inputs: Any, output: Any) -> None:
        module.weight.data = plain.pop(module)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in ignore:
            size = _group_size(name, groups)
            handles.append(
                module.register_forward_pre_hook(lambda module, inputs, size=size: before(module, inputs, size))
            )
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _group_size(name: str, groups: Sequence[tuple[int, Sequence[str]]]) -> int:
    """The group size of a linear: `groups` name them all ("Linear"), or each kind by its last part."""
    kind = name.rsplit(".", 1)[-1]
    return next(
        (size for size, targets in groups if any(each == "Linear" or each.endswith(f".{kind}$") for each in targets)), 0
    )


def round_weight(weight: Tensor, recipe: Recipe, size: int) -> Tensor:
    """`weight [out, in]` on the grid of the recipe's bits, with a scale for each `size` inputs, or each output."""
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, -1, size if recipe.grouped and size else columns)
    steps = 2**recipe.bits - 1
    if recipe.symmetric:
        scale = (grouped.abs().amax(-1, keepdim=True) * 2 / steps).clamp(min=1e-12)
        half = 2 ** (recipe.bits - 1)
        values = (grouped / scale).round().clamp(-half, half - 1) * scale
    else:
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / steps).clamp(min=1e-12)
        zero = (-low / scale).round()
        values = ((grouped / scale + zero).round().clamp(0, steps) - zero) * scale
    rounded: Tensor = values.reshape(rows, columns).to(weight.dtype)
    return rounded


def write_reference(folder: Path, found: Reference) -> None:
    """Keep it with a quantised folder."""
    file = folder / REFERENCE_FILE
    file.parent.mkdir(exist_ok=True)
    save_file({"ids": found.ids, "logprobs": found.logprobs.contiguous()}, file, {"limit": repr(found.limit)})


def read_reference(folder: Path) -> Reference | None:
    """What is kept with a quantised folder; None for any other. Raises `XloomError` (model_not_loadable)."""
    file = folder / REFERENCE_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            return Reference(
                tensors.get_tensor("ids"), tensors.get_tensor("logprobs"), float(tensors.metadata()["limit"])
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise XloomError(
            "model_not_loadable", f"{file} can't be read: {error}", "Delete the quantised folder: it is made anew."
        ) from None
