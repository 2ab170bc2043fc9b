"""The two passes of X-LoRA over one batch, with a paged KV cache for each.

The scaling pass needs the base model's keys and values, the forward pass the mixed ones. So each attention
layer has a twin with pages of its own, registered under `<name>_scaling`: vLLM allocates, shares, preempts and
caches both under one block table. The scaling pass runs the same (compiled) model in a forward context in
which each layer's name stands for its twin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig

# Relied on: ForwardContext.{no_compile_layers,attn_metadata,slot_mapping} are looked up by layer name in
# vllm.model_executor.layers.attention.attention.get_attention_context, vLLM 0.32.
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from xloom.vllm.plugin.figures import tally_of_this_rank
from xloom.vllm.plugin.gates import BATCH

SCALING_SUFFIX = "_scaling"


class ScalingAttention(AttentionLayerBase):
    """An attention layer's twin: the same layer with KV pages of its own."""

    def __init__(self, source: Attention, name: str) -> None:
        self.source = source
        self.layer_name = name
        self.kv_cache = torch.tensor([])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def get_attn_backend(self) -> type[AttentionBackend]:
        backend: type[AttentionBackend] = self.source.get_attn_backend()
        return backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return self.source.get_kv_cache_spec(vllm_config)


class TwoPass:
    """Runs a model's forward once, or twice when the batch holds X-LoRA tokens."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        layers = vllm_config.compilation_config.static_forward_context
        self.twin_of: dict[str, str] = {}
        self._tally = tally_of_this_rank(vllm_config.device_config.device_type)
        for name, layer in list(layers.items()):
            if isinstance(layer, Attention):
                twin = name + SCALING_SUFFIX
                layers[twin] = ScalingAttention(layer, twin)
                self.twin_of[name] = twin

    def run(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The hidden states `[num_tokens, hidden]` of the forward pass."""
        entries, gater, tally = BATCH.xlora(), BATCH.gater, self._tally
        context = get_forward_context()
        if not entries or gater is None or not context.attn_metadata:
            return forward()  # profiling, warm-up and graph capture have no attention metadata
        if tally is not None:
            tally.start()
        for entry in entries:
            routing = entry.routing
            assert routing is not None
            if routing.base_only_scaling:
                gater.leave_out(entry)
            else:
                gater.set_gates(entry, routing.routing.scaling_pass_gates().unsqueeze(0))
        with override_forward_context(self._scaling_context(context)):
            hidden = forward()
        if tally is not None:
            tally.lap()
        for entry in entries:
            assert entry.routing is not None
            gates = entry.routing.routing.gates(hidden[entry.rows])
            gater.set_gates(entry, gates)
            if tally is not None:
                tally.add(entry.routing.name, entry.routing.routing, gates)
        if tally is not None:
            tally.lap()
        mixed = forward()
        if tally is not None:
            tally.lap()
        return mixed

    def _scaling_context(self, context: Any) -> Any:
        metadata, slots = context.attn_metadata, context.slot_mapping
        if not isinstance(metadata, dict):
            raise NotImplementedError("X-LoRA does not run with micro-batches (dual-batch overlap)")
        return dataclasses.replace(
            context,
            no_compile_layers=context.no_compile_layers
            | {name: context.no_compile_layers[twin] for name, twin in self.twin_of.items()},
            attn_metadata=metadata | {name: metadata[twin] for name, twin in self.twin_of.items()},
            slot_mapping=slots | {name: slots[twin] for name, twin in self.twin_of.items() if twin in slots},
        )
