"""A router composed from two adapters and a few lines of text, its training interrupted once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xloom.compose.composition import Listener, compose
from xloom.compose.options import Options
from xloom.compose.plan import Plan
from xloom.compose.training import Told
from xloom.settings import ModelSettings

STEPS = 6


class Interrupting(Listener):
    """Ctrl-C in mid-training, once."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def step(self, told: Told) -> None:
        self.told.append(told.step)
        if len(self.told) == STEPS // 2:
            raise KeyboardInterrupt


def composed(model: Path, adapters: Mapping[str, Path], routing: str, folder: Path) -> Path:
    """The folder of a router of a tiny model's adapters; large steps, so that its gates are far from equal."""
    text = {name: folder / f"{name}.txt" for name in adapters}
    for file, words in zip(text.values(), ("abc defg ", "12+3=15 "), strict=True):
        file.write_text("\n\n".join(words * (8 + number) for number in range(64)))
    plan = Plan(
        base=ModelSettings(source=str(model)),
        adapters=adapters,
        text={name: str(file) for name, file in text.items()},
        mixed=None,
        out=folder / "out",
        device="cpu",
        options=Options(routing=routing, steps=STEPS, batch=2, length=32, held_out_rows=1, learning_rate=0.1),
    )
    listener, tokenizer = Interrupting(), AutoTokenizer.from_pretrained(model)
    with pytest.raises(KeyboardInterrupt):
        compose(plan, tokenizer, listener)
    compose(plan, tokenizer, listener)
    assert listener.told == list(range(1, STEPS + 1))
    return plan.out
