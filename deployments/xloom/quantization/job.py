"""What the worker is asked to do: a JSON file between two processes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from xloom.quantization.recipes import Recipe


@dataclass(frozen=True)
class Job:
    """One model to quantise into one folder."""

    model: str  # a local folder
    out: str
    device: str
    dtype: str  # the checkpoint's own
    recipe: Recipe
    groups: list[tuple[int, list[str]]]  # group size, the linears it is for; 0 without groups
    ignore: list[str]  # linears that stay as they are
    calibration: str
    samples: int  # windows


def write_job(job: Job, file: Path) -> None:
    """Write it for the worker."""
    file.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")


def read_job(file: Path) -> Job:
    """What `write_job` wrote."""
    data = json.loads(file.read_text(encoding="utf-8"))
    groups = [(int(size), list(targets)) for size, targets in data.pop("groups")]
    return Job(recipe=Recipe(**data.pop("recipe")), groups=groups, **data)
