"""`linear`: gates by a learned matrix and bias over each linear's own input (PHATGOOSE, LoRAMoE, MoLoRA)."""

from __future__ import annotations

from typing import ClassVar

from xloom.mixtures.routing.inputs import InputRouting


class LinearRouting(InputRouting):
    """softmax or sigmoid of the `top_k` largest of R x + b; read from disk by `xloom.mixtures.linear_router`."""

    kind: ClassVar[str] = "linear"
