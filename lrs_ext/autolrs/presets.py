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

_TENSORS = ("positions", "objectives", "deviations", "start", "start_std", "best")


class Search:
    """What the trials of all stages have shown, on the device.

    Attributes:
        positions: float64, (stages, trials): log10 of the tried learning rates.
        objectives: float64, (stages, trials): what a trial is judged by, inf if it diverged.
        deviations: float64, (stages, trials): standard deviations of the objectives, 0 if unknown.
        start: float64, (stages,): the loss before a stage's first update, about.
        start_std: float64, (stages,): how much losses differ from batch to batch at the start.
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
        self.start_std = torch.zeros_like(self.start)
        self.best = torch.full_like(self.start, math.nan)

    def propose(self, stage: int, trial: int) -> Tensor:
        """Returns the learning rate of a trial, float64, 0-d, from those before it."""
        position = self._position(stage, trial)
        self.positions[stage, trial].fill_(position)
        return search.rate_at(self.positions[stage, trial])

    def record(self, stage: int, trial: int, losses: Tensor, horizon: float) -> None:
        """Judges a trial.

        Args:
            losses: what was measured during it, (n,).
            horizon: the stage's end in the unit of `losses`, counted from its first entry.
        """
        losses = losses.to(torch.float64)
        objective, deviation = self._judge(losses, horizon)
        if trial == 0:
            self.start[stage].copy_(self._starting_loss(losses))
            std = losses.std(correction=0)
            self.start_std[stage].copy_(torch.where(std.isfinite(), std, 0.0))
        self.objectives[stage, trial].copy_(objective)
        self.deviations[stage, trial].copy_(deviation)

    def choose(self, stage: int) -> Tensor:
        """Returns the learning rate to train with, float64, 0-d."""
        self.best[stage].copy_(self._choice(stage))
        return search.rate_at(self.best[stage])

    def seen(self, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns positions, objectives and deviations that the choice is made from."""
        return self._trials(stage, slice(None))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in _TENSORS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])

    def _trials(self, stage: int, which: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Returns positions, objectives and deviations as the GP sees them."""
        objectives = self.objectives[stage, which]
        values = search.capped(objectives, self.start[stage])
        # A forecast gone astray is just as unsure of itself, but that the trial is bad is certain.
        deviations = torch.where(values < objectives, 0.0, self.deviations[stage, which])
        return self.positions[stage, which], values, deviations

    def _position(self, stage: int, trial: int) -> float | Tensor:
        raise NotImplementedError

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _starting_loss(self, losses: Tensor) -> Tensor:
        """Returns the loss of a stage without any progress, from its first trial.

        The first loss alone is that of a single batch, which may be an easy one.
        """
        raise NotImplementedError

    def _choice(self, stage: int) -> Tensor:
        raise NotImplementedError


class PeakSearch(Search):
    """One search for the peak of a decay to zero.

    The first trials are spread evenly over the bounds, the others go downhill from the best. A
    trial decays to zero, as the training will, and is judged by losses at its end.
    """

    forecasts = False

    def _position(self, stage: int, trial: int) -> float | Tensor:
        spread = self._spread()
        if trial < len(spread):
            return spread[trial]
        return search.next_downhill(*self._valley(stage, slice(trial)))

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        return search.tail_mean(losses, search.JUDGED_PERCENT), losses.new_zeros(())

    def _starting_loss(self, losses: Tensor) -> Tensor:
        # The first trial has the lowest rate there is, with which next to nothing happens.
        idle = losses.mean()
        return torch.where(idle.isfinite(), idle, losses[0]).maximum(losses[0])

    def _choice(self, stage: int) -> Tensor:
        positions, values = self._valley(stage, slice(None))
        lowest, second, *_ = self._spread()
        return search.peak_between(
            positions, values, self.start[stage], self.grid, gap=second - lowest
        )

    def _spread(self) -> list[float]:
        timetable = self.timetable
        return search.spread(self.bounds, timetable.num_trials - timetable.num_downhill)

    def _valley(self, stage: int, which: slice) -> tuple[Tensor, Tensor]:
        positions, values, _ = self._trials(stage, which)
        return positions, search.first_valley(positions, values, self.start[stage])


class PaperSearch(Search):
    """The paper's search in every stage, with the constants of the authors' code.

    The first trial of a stage is drawn at random (log-uniform), the others minimise a lower
    confidence bound on the loss forecast for the stage's end. The choice is the tried rate with the
    lowest posterior mean.

    Source: Jin et al., AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the
    Fly, ICLR 2021, arXiv 2105.10762; constants of github.com/YuchenJin/autolrs.
    """

    forecasts = True

    def _position(self, stage: int, trial: int) -> float | Tensor:
        if trial == 0:
            low, high = map(math.log10, self.bounds)
            return random.Random(f"{self.seed} {stage}").uniform(low, high)
        return search.next_by_bound(*self._trials(stage, slice(trial)), self.grid)

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        mean, deviation = forecast(losses, horizon)
        has_diverged = ~losses.isfinite().all() | ~mean.isfinite() | ~deviation.isfinite()
        return (
            torch.where(has_diverged, torch.inf, mean),
            torch.where(has_diverged, 0.0, deviation),
        )

    def _starting_loss(self, losses: Tensor) -> Tensor:
        opening = losses[: max(len(losses) // 4, 1)].median()
        # It may have diverged at once.
        return torch.where(opening < search.FAR * losses[0], opening, losses[0]).maximum(losses[0])

    def _choice(self, stage: int) -> Tensor:
        any_finite = self.objectives[stage].isfinite().any()
        # Where nothing went well, the least rate there is.
        return torch.where(any_finite, search.best_tried(*self.seen(stage)), self.grid[0])
