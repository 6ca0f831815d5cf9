"""The two ways to search: once for the peak of a decay, or stage by stage as in the paper."""

from __future__ import annotations

import math
import random
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrs_ext.autolrs import search
from lrs_ext.autolrs.forecast import forecast
from lrs_ext.autolrs.timetable import Timetable

_TENSORS = ("positions", "objectives", "deviations", "start", "best")


class Search:
    """What the trials of all stages have shown, on the device.

    Attributes:
        positions: float64, (stages, trials): log10 of the tried learning rates.
        objectives: float64, (stages, trials): what a trial is judged by, inf if it diverged.
        deviations: float64, (stages, trials): standard deviations of the objectives, 0 if unknown.
        start: float64, (stages,): the loss before a stage's first update.
        best: float64, (stages,): log10 of the chosen learning rate.
        grid: float64, (candidates,): log10 of the learning rates that are considered.
    """

    forecasts: ClassVar[bool]  # whether an objective is a forecast for the stage's end

    def __init__(
        self, timetable: Timetable, bounds: search.Bounds, device: torch.device, seed: int
    ) -> None:
        self.timetable, self.bounds, self.seed = timetable, bounds, seed
        self.grid = search.candidates(bounds, device)
        shape = (timetable.num_stages, timetable.num_trials)
        self.positions = torch.full(shape, math.nan, dtype=torch.float64, device=device)
        self.objectives = torch.full_like(self.positions, math.nan)
        self.deviations = torch.zeros_like(self.positions)
        self.start = torch.full_like(self.positions[:, 0], math.nan)
        self.best = torch.full_like(self.start, math.nan)

    def propose(self, stage: int, trial: int) -> Tensor:
        """Returns the learning rate of a trial, float64, 0-d, from those before it."""
        position = self.positions[stage, trial]
        fixed = self._fixed_position(stage, trial)
        if fixed is not None:
            position.fill_(fixed)
        else:
            position.copy_(self._next(stage, *self._trials(stage, trial)))
        return search.rate_at(position)

    def record(self, stage: int, trial: int, losses: Tensor, horizon: float) -> None:
        """Judges a trial.

        Args:
            losses: what was measured during it, (n,).
            horizon: the stage's end in the unit of `losses`, counted from its first entry.
        """
        losses = losses.to(torch.float64)
        if trial == 0:
            self.start[stage].copy_(losses[0])
        objective, deviation = self._judge(losses, horizon)
        self.objectives[stage, trial].copy_(objective)
        self.deviations[stage, trial].copy_(deviation)

    def choose(self, stage: int) -> Tensor:
        """Returns the learning rate to train with, float64, 0-d."""
        position = self._choice(stage, *self._trials(stage, self.timetable.num_trials))
        self.best[stage].copy_(position)
        return search.rate_at(self.best[stage])

    def seen(self, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns positions, objectives and deviations of a whole stage, as the GP sees them."""
        return self._trials(stage, self.timetable.num_trials)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in _TENSORS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])

    def _trials(self, stage: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        objectives = self.objectives[stage, :count]
        values = search.capped(objectives, self.start[stage])
        # A forecast gone astray is just as unsure of itself, but that the trial is bad is certain.
        deviations = torch.where(values < objectives, 0.0, self.deviations[stage, :count])
        return self.positions[stage, :count], values, deviations

    def _fixed_position(self, stage: int, trial: int) -> float | None:
        """Returns a position that does not depend on the losses, or None if it does."""
        raise NotImplementedError

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _next(self, stage: int, positions: Tensor, values: Tensor, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def _choice(self, stage: int, positions: Tensor, values: Tensor, noise: Tensor) -> Tensor:
        raise NotImplementedError


class PeakSearch(Search):
    """One search for the peak of a decay to zero.

    The first 5 of 8 trials (in this proportion) are spread evenly over the bounds, the rest go
    where improvement is expected. A trial is judged by the mean of the last quarter of its losses.
    """

    forecasts = False

    def _fixed_position(self, stage: int, trial: int) -> float | None:
        num_trials = self.timetable.num_trials
        spread = search.spread(self.bounds, min(num_trials, max(2, round(num_trials * 5 / 8))))
        return spread[trial] if trial < len(spread) else None

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        return search.tail_mean(losses), losses.new_zeros(())

    def _next(self, stage: int, positions: Tensor, values: Tensor, noise: Tensor) -> Tensor:
        return search.next_by_improvement(positions, values, self.grid)

    def _choice(self, stage: int, positions: Tensor, values: Tensor, noise: Tensor) -> Tensor:
        trials, train = self.timetable.stage(stage)
        return search.best_peak(positions, values, self.grid, trials[0].steps, train.steps)


class PaperSearch(Search):
    """The paper's search in every stage, with the constants of the authors' code.

    The first trial of a stage is drawn at random (log-uniform), the others minimise a lower
    confidence bound on the loss forecast for the stage's end. The choice is the tried rate with the
    lowest posterior mean.

    Source: Jin et al., AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the
    Fly, ICLR 2021, arXiv 2105.10762; constants of github.com/YuchenJin/autolrs.
    """

    forecasts = True

    def _fixed_position(self, stage: int, trial: int) -> float | None:
        if trial > 0:
            return None
        low, high = map(math.log10, self.bounds)
        return random.Random(f"{self.seed} {stage}").uniform(low, high)

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        mean, deviation = forecast(losses, horizon)
        has_diverged = ~losses.isfinite().all() | ~mean.isfinite() | ~deviation.isfinite()
        return (
            torch.where(has_diverged, torch.inf, mean),
            torch.where(has_diverged, 0.0, deviation),
        )

    def _next(self, stage: int, positions: Tensor, values: Tensor, noise: Tensor) -> Tensor:
        return search.next_by_bound(positions, values, noise, self.grid)

    def _choice(self, stage: int, positions: Tensor, values: Tensor, noise: Tensor) -> Tensor:
        any_finite = self.objectives[stage].isfinite().any()
        # Where nothing went well, the least rate there is.
        return torch.where(any_finite, search.best_tried(positions, values, noise), self.grid[0])
