"""From a plan to a trained router on disk and the table of what it came to."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from xloom.compose.bundle_writer import copy_adapters, write_router
from xloom.compose.checkpoint import Checkpoint
from xloom.compose.course import CHOSEN_BY, Course
from xloom.compose.evaluation import Agreement, Figures, agreement, chosen_arrow, figures, ways
from xloom.compose.learned import LearnedRouter
from xloom.compose.mixture import Mixture
from xloom.compose.model import load_base
from xloom.compose.plan import Plan
from xloom.compose.router import BundleRouter, Router
from xloom.compose.teacher import Teacher
from xloom.compose.text import MIXED, Batches, Streams, held_out_rows, text_encoder
from xloom.compose.training import SAVE_S, Told, train
from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.lora import LoraWeights, read_lora
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.routing.arrow import ArrowRouting
from xloom.mixtures.stacking import stack_adapters
from xloom.protocol import XloomError

PIECE = 128  # tokens of one domain in a row that joins several
RECORD = "compose.json"  # what was asked for and what came of it, beside the router
_HELD_OUT_TOKENS = 1 << 20  # read at most, of each text


class Listener:
    """What is told of a composition's course; tells nobody."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def step(self, told: Told) -> None:
        """A step of the training is done."""


@dataclass(frozen=True)
class Composed:
    """What came of a plan."""

    figures: Figures
    arrow: ArrowRouting  # with the top k and temperature that suited the training text best
    agreement: Agreement | None  # with the bundle that was learned from, on held-out rows
    seconds: float  # of the training, in this process
    record: dict[str, Any]


def compose(plan: Plan, tokenizer: Any, listener: Listener | None = None, save_s: float = SAVE_S) -> Composed:
    """Train the router of a plan, write it with its adapters to `plan.out`, and judge it on held-out text.

    An interrupted run goes on when it is asked for again. Raises `XloomError`: as `Plan.check`, `read_lora`,
    `Teacher.read`, `load_base`, `Streams.read`, and training does.
    """
    listener = listener or Listener()
    plan.check()
    checkpoint = Checkpoint(plan.out, plan.run())
    checkpoint.load()  # refused before anything is loaded
    listener.stage("Reading text")
    options = plan.options
    rows = options.batch * max(1, options.steps, options.tune)
    limit = options.length * max(rows, options.fitted_rows)
    read = partial(Streams.read, plan.text, plan.mixed, text_encoder(tokenizer))
    training, kept = read(held_out=False, limit=limit), read(held_out=True, limit=_HELD_OUT_TOKENS)
    piece = min(PIECE, options.length // 2)
    batches = Batches(training, options.batch, options.length, piece, options.seed)
    batches.check()
    listener.stage(f"Loading {plan.base.source}")
    made = _Parts.of(plan)
    longest = getattr(made.mixture.config, "max_position_embeddings", None) or 1 << 30
    columns = held_out_rows(kept, options.held_out_rows, longest, options.seed)
    if options.length > longest:
        message = f"The base model has {longest} positions, and rows of {options.length} tokens were asked for."
        raise XloomError("invalid_composition", message, f"Give --length {longest} or less.")
    listener.stage("Training")
    began = time.monotonic()
    course = Course(made.mixture, made.teacher, batches, options)
    router = course.router()
    if checkpoint.load() is None:
        course.begin(router)
    train(router, course.training(router), checkpoint, listener.step, save_s)
    seconds = time.monotonic() - began
    listener.stage("Writing")
    folders = plan.adapters if made.teacher is None else {
        name: weights.folder for name, weights in made.teacher.adapters.items()
    }  # fmt: skip
    paths = copy_adapters(folders, plan.out)
    write_router(plan.out, router, paths, plan.base.source)
    composed = _judged(plan, made, router, columns, batches, seconds, listener.stage)
    (plan.out / RECORD).write_text(json.dumps(composed.record, indent=1) + "\n", encoding="utf-8")
    checkpoint.remove()
    return composed


@dataclass(frozen=True)
class _Parts:
    """The model with its adapters, and the bundle that is learned from, if one is."""

    mixture: Mixture
    adapters: Sequence[LoraWeights]
    teacher: Teacher | None

    @classmethod
    def of(cls, plan: Plan) -> _Parts:
        modules = linear_modules(plan.base.source, plan.base.revision)
        base = BaseWeights(plan.base.source, plan.base.revision)
        teacher = None
        if plan.bundle is not None:
            teacher = Teacher.read(plan.bundle, modules, _hidden_size(plan), plan.root, base)
            adapters: dict[str, LoraWeights] = teacher.adapters
        else:
            adapters = {name: read_lora(folder, modules, base) for name, folder in plan.adapters.items()}
        stack = stack_adapters(adapters, modules)  # a wrong base is known before the model is loaded
        return cls(Mixture(load_base(plan.base, plan.device), stack), list(adapters.values()), teacher)


def _hidden_size(plan: Plan) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(plan.base.source, revision=plan.base.revision)
    return int(config.get_text_config().hidden_size)


def _judged(
    plan: Plan,
    made: _Parts,
    router: LearnedRouter,
    columns: dict[str, Tensor],
    batches: Batches,
    seconds: float,
    stage: Callable[[str], None],
) -> Composed:
    mixture = made.mixture
    stage("Choosing Arrow's top k and temperature on training text")
    arrow = chosen_arrow(mixture, made.adapters, batches.draw(CHOSEN_BY)[0])
    routers: dict[str, Router | None] = ways(mixture, arrow)
    bundle: BundleRouter | None = None
    if made.teacher is not None:
        bundle = made.teacher.router(mixture.device)
        routers["bundle"] = bundle
    routers["router"] = router.eval()
    found = figures(mixture, routers, columns, lambda name: stage(f"Judging {name} on held-out text"))
    alike = None
    if bundle is not None:
        stage("Judging agreement with the bundle")
        alike = agreement(mixture, bundle, router, columns.get(MIXED, next(iter(columns.values()))))
    record = {
        "out": str(plan.out),
        "routing": plan.options.routing,
        "adapters": list(mixture.stack.names),
        "options": dataclasses.asdict(plan.options),
        "device": str(mixture.device),
        "seconds": round(seconds, 1),
        "perplexity": found.perplexity,
        "gates": found.gates,
        "arrow": {"top_k": arrow.top_k, "temperature": arrow.temperature},
    }
    if alike is not None:
        record["agreement"] = dataclasses.asdict(alike)
    return Composed(found, arrow, alike, seconds, record)
