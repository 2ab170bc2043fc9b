"""The tiny model that is served, its adapters and bundle, and the settings that serve them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models import ADAPTERS, tiny_adapter, tiny_bundle, tiny_model

MAX_LENGTH = 8192  # tokens: half a minute of a stream and more, so that it still runs when a test interferes

Oracle = Callable[[str, tuple[int, ...], int], list[int]]  # name, prompt, count -> greedy tokens


@dataclass(frozen=True)
class Weights:
    """The folders of what is served: `base`, adapters `alpha` and `beta`, and the bundle `blend`."""

    base: Path
    adapters: dict[str, Path]
    bundle: Path


def make_weights(folder: Path) -> Weights:
    """Write everything."""
    base = tiny_model(folder / "base", "llama")
    # Its positions are rotary, so that a greater length changes no weight.
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        written = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(written | {key: MAX_LENGTH}))
    return Weights(
        base,
        {
            "alpha": tiny_adapter(folder / "alpha", base, seed=7, **ADAPTERS[0]),
            "beta": tiny_adapter(folder / "beta", base, seed=8, **ADAPTERS[1]),
        },
        tiny_bundle(folder / "blend", base, seed=3, depth=2),
    )


def settings_for(weights: Weights, **sections: Any) -> dict[str, Any]:
    """A deployment of the tiny model; `sections` of the settings add to it."""
    engine = {
        "dtype": "float32",
        "compile": False,
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": 64,
        "paged_attention": {"max_blocks": 4096},
    }
    return {
        "model": {"source": str(weights.base)},
        "adapters": [{"name": name, "source": str(path)} for name, path in weights.adapters.items()],
        "xlora": [{"name": "blend", "source": str(weights.bundle)}],
        **sections,
        "engine": engine | sections.get("engine", {}),
    }
