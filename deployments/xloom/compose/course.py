"""What a router goes through: where its training starts from, and what that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xloom.compose.learned import ClassifierRouter, LearnedRouter, LinearRouter
from xloom.compose.least_squares import fit
from xloom.compose.losses import language_loss
from xloom.compose.mixture import Mixture
from xloom.compose.options import Options
from xloom.compose.teacher import Teacher
from xloom.compose.text import Batches
from xloom.compose.training import Training

# Batches have numbers: those of the steps, and below them these.
LOOKED_AT, CHOSEN_BY, FITTED_TO = -1, -2, -3  # for the inputs' mean and deviation; for Arrow's options; for the fit


@dataclass(frozen=True)
class Course:
    """The training of one router over a mixture, from text alone or from a bundle's gates."""

    mixture: Mixture
    teacher: Teacher | None
    batches: Batches
    options: Options

    def router(self) -> LearnedRouter:
        """A router of the kind that the options ask for, as yet of no use."""
        stack, options = self.mixture.stack, self.options
        torch.manual_seed(options.seed)
        made: LearnedRouter
        if self.teacher is not None:
            made = self.teacher.student(stack, options.temperature)
        elif options.routing == "linear":
            made = LinearRouter(stack, temperature=options.temperature)
        else:
            made = ClassifierRouter(
                stack,
                self.mixture.config.hidden_size,
                depth=options.depth,
                size=options.size,
                layerwise=options.layerwise,
                temperature=options.temperature,
            )
        return made.to(self.mixture.device)

    def begin(self, router: LearnedRouter) -> None:
        """Bring a router to where its training starts from: equal gates, or a bundle's, by least squares."""
        router.look(self.mixture, self._drawn(self.batches, LOOKED_AT)[0])
        if self.teacher is not None:
            assert isinstance(router, LinearRouter)
            ids, _ = self._drawn(replace(self.batches, rows=self.options.fitted_rows), FITTED_TO)
            bundle = self.teacher.router(self.mixture.device)
            fit(self.mixture, router, ids, bundle.logits(self.mixture.scaling_hidden(ids, bundle), router.activation))

    def training(self, router: LearnedRouter) -> Training:
        """The steps from there on, by the language model's loss."""
        options, tuned = self.options, self.teacher is not None
        name, steps = ("tuning the router", options.tune) if tuned else ("training the router", options.steps)
        share = 0.0 if tuned else options.domain_share

        def loss(step: int) -> Tensor:
            return language_loss(self.mixture, router, *self._drawn(self.batches, step), share)

        return Training(name, steps, options.learning_rate, loss)

    def _drawn(self, batches: Batches, number: int) -> tuple[Tensor, Tensor]:
        ids, domains = batches.draw(number)
        return ids.to(self.mixture.device), domains.to(self.mixture.device)
