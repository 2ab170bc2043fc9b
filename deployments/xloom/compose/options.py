"""How a router is made and trained: plain values, for the command line too."""

from __future__ import annotations

from dataclasses import dataclass

ROUTINGS = ("linear", "xlora")


@dataclass(frozen=True)
class Options:
    """How a router is made and trained. Steps are of `batch` rows of `length` tokens."""

    routing: str = "linear"
    depth: int = 1  # of the classifier
    size: int = 256  # of its inner layers
    layerwise: bool = True  # gates of their own for each linear
    temperature: float = 1.0
    steps: int = 60  # of language-model loss, from equal gates
    fitted_rows: int = 32  # on which a bundle's gates are fitted by least squares
    tune: int = 0  # of language-model loss after that
    batch: int = 4
    length: int = 512
    learning_rate: float = 1e-2
    domain_share: float = 0.05  # of the cross-entropy between mean gate and domain
    seed: int = 0
    held_out_rows: int = 8  # a column of the table
