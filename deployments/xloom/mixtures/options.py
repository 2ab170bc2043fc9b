"""How a bundle's router turns logits into gates."""

from __future__ import annotations

from dataclasses import dataclass

XLORA_FILE = "xlora.json"  # of a prepared mixture of any kind: its routing
ROUTER_FILE = "xlora_router.safetensors"  # of a prepared mixture: what its routing is made with, if anything
FORMAT = 1  # of both
MIXING_MODES = ("additive", "concatenate", "gated")
PASSES = (1, 2)
PREFILLS = ("exact", "lagged")


@dataclass(frozen=True)
class RoutingOptions:
    """How the classifier's logits become gates; names and defaults are peft.XLoraConfig's."""

    layerwise_scalings: bool = False
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    mixing_mode: str = "additive"
    routing_passes: int = 2  # 1: see `single_pass`; no bundle asks for it by itself
    prefill: str = "exact"  # of one pass
