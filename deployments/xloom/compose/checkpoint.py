"""What an interrupted training goes on from: one safetensors file, whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xloom.protocol import XloomError

FILE = "checkpoint.safetensors"
PART = "checkpoint.part"  # one that is being written


@dataclass(frozen=True)
class Progress:
    """How far a training has come: `done` steps."""

    done: int
    router: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]


class Checkpoint:
    """The checkpoint of one training in a folder; `run` stands for all that decides its course."""

    def __init__(self, folder: Path, run: str) -> None:
        self.file, self._run = folder / FILE, run

    def save(self, progress: Progress) -> None:
        """Write it in place of an older one. Raises `OSError`."""
        tensors = {f"router.{name}": tensor for name, tensor in progress.router.items()}
        tensors |= {f"optimiser.{name}": tensor for name, tensor in progress.optimiser.items()}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        state = {"run": self._run, "done": progress.done}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_name(PART)
        save_file(tensors, scratch, metadata={"xloom": json.dumps(state)})
        os.replace(scratch, self.file)

    def load(self) -> Progress | None:
        """What is there of this training, if anything. Raises `XloomError` (checkpoint_unusable)."""
        if not self.file.exists():
            return None
        try:
            with safe_open(self.file, framework="pt") as opened:
                state = json.loads(opened.metadata()["xloom"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            run, done = str(state["run"]), int(state["done"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._unusable(f"can't be read: {error!r}") from None
        if run != self._run:
            raise self._unusable("is of a training with other options, adapters or text")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}

        return Progress(done, part("router."), part("optimiser."))

    def remove(self) -> None:
        """The training is over."""
        self.file.unlink(missing_ok=True)
        self.file.with_name(PART).unlink(missing_ok=True)

    def _unusable(self, why: str) -> XloomError:
        cure = f"Give the same options to go on, another --out, or delete {self.file} to begin anew."
        return XloomError("checkpoint_unusable", f"The checkpoint {self.file} {why}.", cure)
