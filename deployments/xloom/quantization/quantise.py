"""From a plain model and the `isq` settings to a quantised model in the node's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from xloom.protocol import XloomError
from xloom.quantization import calibration, overlay
from xloom.quantization.checkpoint import stored_bytes
from xloom.quantization.fitting import choose_bits, free_bytes
from xloom.quantization.job import Job, write_job
from xloom.quantization.model_cache import QuantisedModelCache, model_digest
from xloom.quantization.recipes import Recipe, group_sizes, recipe_for
from xloom.quantization.source import PlainModel, plain_model
from xloom.settings import IsqSettings, ModelSettings

logger = logging.getLogger(__name__)

FORMAT = 4  # of what is written: raised when the same settings come to give other files
LOG_TAIL = 2000  # characters of the worker's log that an error shows

Report = Callable[[str, int, int], None]  # stage, parts done, parts


@dataclass(frozen=True)
class Plan:
    """What a model and the settings come to: the recipe, the groups, and the key of the result."""

    model: PlainModel
    recipe: Recipe
    sizes: dict[str, int]  # group size of each kind of linear; empty without groups
    key: str


def quantised(
    model: ModelSettings, isq: IsqSettings, device: str, *, reserved: int = 0, ranks: int = 1
) -> ModelSettings:
    """The model with its weights quantised as asked, from the cache or made now: its source is the cached folder.

    `reserved` is what KV pages will take, in bytes, for `bits: auto`, which may leave the model as it is. Blocks until
    it is there. Raises `XloomError`.
    """
    plain = plain_model(model)
    bits = isq.bits
    if bits == "auto":
        choice = choose_bits(
            isq.method, device, plain.weights, free=free_bytes(device), reserved=reserved, group_size=isq.group_size
        )
        logger.warning(
            "isq.bits auto: %s (%s)", f"{choice.bits} bits" if choice.bits else "not quantised", choice.reason
        )
        if choice.bits is None:
            return model
        isq = isq.model_copy(update={"bits": choice.bits})
    folder = quantised_folder(plan(plain, isq, device, ranks), isq, device)
    return model.model_copy(update={"source": str(folder), "revision": None})


def plan(model: PlainModel, isq: IsqSettings, device: str, ranks: int = 1) -> Plan:
    """Settle the recipe. Raises `XloomError`: isq_unsupported, isq_group_size, isq_unsupported_model, isq_missing."""
    assert isq.bits != "auto"
    recipe = recipe_for(isq.method, isq.bits, device)
    sizes = group_sizes(model.linears, isq.group_size, device, ranks) if recipe.grouped else {}
    for size in sorted({size for size in sizes.values() if size != isq.group_size}):
        kinds = ", ".join(kind for kind, found in sizes.items() if found == size)
        logger.warning("isq.group_size %d does not suit %s: %d there", isq.group_size, kinds, size)
    parts: dict[str, Any] = {
        "format": FORMAT,
        "model": model_digest(model.folder, Path(isq.cache).expanduser()),
        "recipe": asdict(recipe),
        "sizes": sizes,
        "device": device,
        "versions": overlay.versions(),
    }
    if recipe.calibrates:
        if calibration.is_local(isq.calibration):
            calibration.documents(isq.calibration, held_out=False)  # before the model is loaded for it
        parts |= {"calibration": calibration.fingerprint(isq.calibration), "samples": isq.calibration_samples}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Plan(model, recipe, sizes, key)


def quantised_folder(plan: Plan, isq: IsqSettings, device: str, report: Report | None = None) -> Path:
    """The cached folder of a plan, made now when it is not there. Raises `XloomError` (isq_failed), and the cache's."""

    def make(out: Path) -> dict[str, Any]:
        start = time.perf_counter()
        with contextlib.nullcontext(report) if report is not None else shown_progress(plan) as tell:
            _work(_job(plan, isq, device, out), tell)
        told = json.loads((out / "worker.json").read_text(encoding="utf-8"))
        (out / "worker.json").unlink()
        before, after = stored_bytes(plan.model.folder, plan.model.linears), stored_bytes(out, plan.model.linears)
        return {
            "model": str(plan.model.folder),
            "recipe": asdict(plan.recipe),
            "group_sizes": plan.sizes,
            "calibration": isq.calibration if plan.recipe.calibrates else None,
            "samples": isq.calibration_samples if plan.recipe.calibrates else 0,
            "seconds": round(time.perf_counter() - start, 1),
            "apart": [round(told["apart"], 4), round(told["limit"], 4)],  # from the plain model, and at most: nats
            "linear_bytes": [before[0], after[0]],
            "weight_bytes": [before[1], after[1]],
            "versions": overlay.versions(),
        }

    return QuantisedModelCache(Path(isq.cache)).ensure(plan.key, make)


def _job(plan: Plan, isq: IsqSettings, device: str, out: Path) -> Job:
    sizes = sorted(set(plan.sizes.values()))
    if len(sizes) <= 1:
        groups = [(sizes[0] if sizes else 0, ["Linear"])]
    else:
        groups = [(size, [rf"re:.*\.{kind}$" for kind, own in plan.sizes.items() if own == size]) for size in sizes]
    return Job(
        model=str(plan.model.folder),
        out=str(out.resolve()),  # the worker runs in a folder of its own
        device=device,
        dtype=plan.model.dtype,
        recipe=plan.recipe,
        groups=groups,
        ignore=list(plan.model.ignored),
        calibration=calibration.located(isq.calibration),
        samples=isq.calibration_samples,
    )


def _work(job: Job, tell: Report) -> None:
    """Run the worker to its end. It ends with this process: its standard input is a pipe that then closes."""
    with tempfile.TemporaryDirectory(prefix="xloom-isq-") as folder:
        file, log = Path(folder) / "job.json", Path(folder) / "worker.log"
        write_job(job, file)
        command = [sys.executable, "-m", "xloom.quantization.worker", str(file)]
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=overlay.environment(),
                cwd=folder,
                text=True,
            )
        done, refusal = False, None
        try:
            assert process.stdout is not None
            for line in process.stdout:
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if "error" in message:
                        code, *told = message["error"]
                        refusal = XloomError(code, *told)
                        continue
                    done = message["stage"] == "done"
                    tell(message["stage"], message["done"], message["total"])
            code = process.wait()
        finally:
            process.kill()  # on an exception here; one that has ended is not there to kill
            process.communicate()
        if refusal is not None:
            raise refusal
        if code != 0 or not done:
            tail = log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
            ended = f"by signal {-code}" if code < 0 else f"with code {code}"
            raise XloomError(
                "isq_failed",
                f"Quantising {job.model} ended {ended}: {tail or 'it said nothing'}",
                "A worker killed by signal 9 was mostly out of memory: on CPU it needs 4 bytes a weight, and inputs.",
                500,
            )


@contextlib.contextmanager
def shown_progress(plan: Plan) -> Iterator[Report]:
    """A bar on a terminal; else a line in the log for each stage and each quarter."""
    name = f"{plan.recipe.method} at {plan.recipe.bits} bits"
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(name)

            def show(stage: str, done: int, total: int) -> None:
                bar.update(task, description=f"{name}: {stage}", completed=done, total=total or None)

            yield show
        return
    said: set[tuple[str, int]] = set()

    def log(stage: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 0
        if (stage, quarter) not in said:
            said.add((stage, quarter))
            logger.warning("quantising, %s: %s%s", name, stage, f" {done}/{total}" if total else "")

    yield log
