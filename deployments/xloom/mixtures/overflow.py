"""Whether an adapter's numbers stay finite in the dtypes that engines compute in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from xloom.mixtures.options import RoutingOptions
from xloom.protocol import XloomError

_MAX_VALUE = 65504.0  # float16's largest, the least of the dtypes that engines serve in
# With inputs up to 100, as norms make them, a linear then adds up to 1e11; an MLP multiplies two of these and adds up
# to 1e31, which bfloat16 and float32 hold. Adapters that were trained stay below 1e4.
_MAX_GAIN = 1e9
_MAX_LOGIT = 1e30  # of the softmax's input


def check_range(
    folder: Path, code: str, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]], gate: float = 1.0
) -> None:
    """Refuse A `[rank, in]`, B `[out, rank]` and their scale where B A x would overflow under gates up to `gate`.

    Such an adapter makes NaN, which engines write to KV pages that other requests take over, and theirs come out wrong.
    Raises `XloomError` with `code`.
    """
    for module, (a, b, scale) in matrices.items():
        a, b = a.float().abs(), b.float().abs()
        largest = max(float(a.max()), float(b.max()) * abs(scale))
        gain = float((b @ a.sum(dim=1)).max()) * abs(scale) * gate  # the most it adds to an input of at most 1
        if not (largest <= _MAX_VALUE and gain <= _MAX_GAIN):
            raise XloomError(
                code,
                f"{folder}: {module} with its scale {scale:g} holds values up to {largest:.3g} and can add up to "
                f"{gain:.3g} times its input, which overflows.",
                "Check lora_alpha, alpha_pattern and the weights; save the adapter anew.",
            )


def largest_gate(
    folder: Path, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], options: RoutingOptions
) -> float:
    """About the largest gate a bundle's router gives: ten times that of random hidden states of size 10.

    Raises `XloomError` (broken_bundle) where its softmax would overflow.
    """
    hidden = 10 * torch.randn(64, layers[0][0].shape[1], generator=torch.Generator().manual_seed(0))
    for number, (weight, bias) in enumerate(layers):
        hidden = torch.nn.functional.linear(torch.relu(hidden) if number else hidden, weight, bias)
    logit = 10 * float(hidden.abs().max())
    bounded = options.enable_softmax or options.mixing_mode == "gated"
    if not (logit / options.temperature if bounded else logit) <= _MAX_LOGIT:
        message = f"{folder}: logits up to {logit:.3g} at the temperature {options.temperature:g} overflow."
        raise XloomError("broken_bundle", message, "Check the temperature and the classifier's weights.")
    return max(1.0 if bounded else logit, abs(options.scaling_pass_value))
