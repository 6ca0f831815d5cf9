"""The two ways to search: once for the peak of a decay, or stage by stage as in the paper."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrs_ext.autolrs import search
from lrs_ext.autolrs.forecast import forecast
from lrs_ext.autolrs.surrogate import gp_posterior
from lrs_ext.autolrs.timetable import Segment, Timetable

_TENSORS = ("positions", "objectives", "deviations", "start", "best")


class Search:
    """What the trials of all stages have shown, on the device.

    Args:
        agree: returns what the ranks make of a decision that each of them has come to.

    Attributes:
        positions: float64, (stages, trials): log10 of the tried learning rates.
        objectives: float64, (stages, trials): what a trial is judged by, inf if it diverged.
        deviations: float64, (stages, trials): standard deviations of the objectives, 0 if unknown.
        start: float64, (stages,): the loss before a stage's first update, about, of those that
            trials are judged by.
        best: float64, (stages,): log10 of the chosen learning rate.
        grid: float64, (candidates,): log10 of the learning rates that are considered.
    """

    forecasts: ClassVar[bool]  # whether an objective is a forecast for the stage's end
    _doubts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        timetable: Timetable,
        bounds: search.Bounds,
        device: torch.device,
        seed: int,
        agree: Callable[[Tensor], Tensor],
    ) -> None:
        self.timetable, self.bounds, self.seed = timetable, bounds, seed
        self.agree = agree
        self.grid = search.candidates(bounds, device)
        shape = (timetable.num_stages, timetable.num_trials)
        self.positions = torch.full(shape, math.nan, dtype=torch.float64, device=device)
        self.objectives = torch.full_like(self.positions, math.nan)
        self.deviations = torch.zeros_like(self.positions)
        self.start = torch.full_like(self.positions[:, 0], math.nan)
        self.best = torch.full_like(self.start, math.nan)

    def propose(self, stage: int, first: int, count: int = 1) -> None:
        """Places `count` trials that run at once.

        They are placed one after another from the trials before them. One that has not run yet
        counts as what the others lead to expect of it, so that the next is not put beside it.

        Source: Ginsbourger, Le Riche, Carraro: Kriging Is Well-Suited to Parallelize Optimization,
            2010 (the kriging believer).
        """
        objectives = self.objectives[stage].clone()
        for trial in range(first, first + count):
            self.positions[stage, trial].fill_(self._position(stage, trial, objectives))
            if trial + 1 < first + count:
                objectives[trial].copy_(self._belief(stage, trial, objectives))
        placed = self.positions[stage, first : first + count]
        placed.copy_(self.agree(placed))

    def rates(self, segment: Segment) -> Tensor:
        """Returns the learning rates of its trials, which have been placed, float64, (trials,)."""
        trials = segment.trials
        return search.rate_at(self.positions[segment.stage, trials.start : trials.stop])

    def record(self, stage: int, trial: int, losses: Tensor, horizon: float) -> None:
        """Judges a trial.

        Args:
            losses: what was measured during it, (n,).
            horizon: the stage's end in the unit of `losses`, counted from its first entry.
        """
        losses = losses.to(torch.float64)
        objective, deviation = self._judge(losses, horizon)
        if trial == 0:
            self.start[stage].copy_(self.starting_loss(losses))
        self.objectives[stage, trial].copy_(objective)
        self.deviations[stage, trial].copy_(deviation)

    def starting_loss(self, losses: Tensor) -> Tensor:
        """Returns the loss of a stage without any progress, 0-d, from those of its first trial.

        The first loss alone is that of a single batch, which may be an easy one.
        """
        raise NotImplementedError

    def choose(self, stage: int) -> Tensor:
        """Returns the learning rate to train with, float64, 0-d."""
        self.best[stage].copy_(self.agree(self._choice(stage)))
        return self.agree(search.rate_at(self.best[stage]))

    def doubts(self, stage: int, losses: Tensor, first_losses: Tensor) -> tuple[Tensor, list[str]]:
        """Returns what to tell of a choice, for `Notices`.

        Args:
            losses, first_losses: see `Measurements.first_losses`.
        """
        low, high = self.bounds
        tried = f"between {low:g} and {high:g} that was tried"
        has_any = self.objectives[stage].isfinite().any()
        texts = [
            f"every learning rate {tried} has diverged: lower lr_bounds",
            *(doubt.format(tried=tried) for doubt in self._doubts),
        ]
        doubt = self._doubt(stage, losses, first_losses)
        return torch.where(has_any, doubt + (doubt > 0), 1), texts

    def seen(self, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns positions, objectives and deviations that the choice is made from."""
        return self._trials(stage, slice(None), self.objectives[stage])

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in _TENSORS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])

    def _trials(
        self, stage: int, which: slice, objectives: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns positions, objectives and deviations as the GP sees them."""
        objectives = objectives[which]
        values = search.capped(objectives, self.start[stage])
        # A forecast gone astray is just as unsure of itself, but that the trial is bad is certain.
        deviations = torch.where(values < objectives, 0.0, self.deviations[stage, which])
        return self.positions[stage, which], values, deviations

    def _position(self, stage: int, trial: int, objectives: Tensor) -> float | Tensor:
        """Returns where to put a trial.

        Args:
            objectives: of the stage's trials, (trials,), those before it known or believed.
        """
        raise NotImplementedError

    def _belief(self, stage: int, trial: int, objectives: Tensor) -> Tensor:
        """Returns the objective to expect of a trial, 0-d, from those before it."""
        raise NotImplementedError

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _choice(self, stage: int) -> Tensor:
        raise NotImplementedError

    def _doubt(self, stage: int, losses: Tensor, first_losses: Tensor) -> Tensor:
        """Returns k to tell the k-th of `_doubts`, 0 to tell none, 0-d; see `doubts`."""
        raise NotImplementedError


class PeakSearch(Search):
    """One search for the peak of a decay to zero.

    The first trials are spread evenly over the bounds, the others go downhill from the best. A
    trial decays to zero, as the training will, and is judged by losses at its end.
    """

    forecasts = False
    _doubts = (
        "the first losses of the trials differ, though all start from the same state, so they saw "
        "other batches and the choice is little better than a guess: draw the batches from "
        "auto.batches(loader), or judge by a val_loss",
        "no learning rate {tried} has visibly lowered the loss, compared with the lowest one and "
        "the noise, so the choice is little better than a guess: judge by a val_loss, make trials "
        "longer (trial_steps), or give other lr_bounds",
    )

    def _position(self, stage: int, trial: int, objectives: Tensor) -> float | Tensor:
        spread = self._spread()
        if trial < len(spread):
            return spread[trial]
        return search.next_downhill(*self._valley(stage, slice(trial), objectives))

    def _belief(self, stage: int, trial: int, objectives: Tensor) -> Tensor:
        if trial < len(self._spread()):
            return objectives[trial]  # nobody asks
        positions, values = self._valley(stage, slice(trial), objectives)
        at = self.positions[stage, trial : trial + 1]
        return search.expected(positions, values, at)

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        return search.tail_mean(losses, search.JUDGED_PERCENT), losses.new_zeros(())

    def starting_loss(self, losses: Tensor) -> Tensor:
        # The first trial has the lowest rate there is, with which next to nothing happens.
        # Its last batches, which all trials are judged by, may be harder than the others.
        idle = losses.mean().maximum(search.tail_mean(losses, search.JUDGED_PERCENT))
        return torch.where(idle.isfinite(), idle, losses[0]).maximum(losses[0])

    def _choice(self, stage: int) -> Tensor:
        positions, values = self._valley(stage, slice(None), self.objectives[stage])
        lowest, second, *_ = self._spread()
        return search.peak_between(
            positions, values, self.start[stage], self.grid, gap=second - lowest
        )

    def _doubt(self, stage: int, losses: Tensor, first_losses: Tensor) -> Tensor:
        _, values, _ = self._trials(stage, slice(None), self.objectives[stage])
        is_unclear = values[0] - values.amin() <= search.VISIBLE * search.noise_std(losses)
        is_unpaired = search.are_unpaired(first_losses, self.start[stage], values.amin())
        return torch.where(is_unpaired, 1, 2 * is_unclear)

    def _spread(self) -> list[float]:
        timetable = self.timetable
        return search.spread(self.bounds, timetable.num_trials - timetable.num_downhill)

    def _valley(self, stage: int, which: slice, objectives: Tensor) -> tuple[Tensor, Tensor]:
        positions, values, _ = self._trials(stage, which, objectives)
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
    _doubts = (
        'there are negative losses, of which preset="paper" cannot make a forecast, so the choice '
        'is little better than a guess: add a constant to the loss, or take preset="peak"',
    )

    def _position(self, stage: int, trial: int, objectives: Tensor) -> float | Tensor:
        if trial == 0:
            low, high = map(math.log10, self.bounds)
            return random.Random(f"{self.seed} {stage}").uniform(low, high)
        return search.next_by_bound(*self._trials(stage, slice(trial), objectives), self.grid)

    def _belief(self, stage: int, trial: int, objectives: Tensor) -> Tensor:
        if trial == 0:
            return objectives[trial]  # unknown: trials without an objective are equally bad
        at = self.positions[stage, trial : trial + 1]
        mean, _ = gp_posterior(*self._trials(stage, slice(trial), objectives), at)
        return mean.squeeze(0)

    def _judge(self, losses: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
        mean, deviation = forecast(losses, horizon)
        has_diverged = ~losses.isfinite().all() | ~mean.isfinite() | ~deviation.isfinite()
        return (
            torch.where(has_diverged, torch.inf, mean),
            torch.where(has_diverged, 0.0, deviation),
        )

    def starting_loss(self, losses: Tensor) -> Tensor:
        opening = losses[: max(len(losses) // 4, 1)].median()
        # It may have diverged at once.
        return torch.where(opening < search.FAR * losses[0], opening, losses[0]).maximum(losses[0])

    def _choice(self, stage: int) -> Tensor:
        any_finite = self.objectives[stage].isfinite().any()
        # Where nothing went well, the least rate there is.
        return torch.where(any_finite, search.best_tried(*self.seen(stage)), self.grid[0])

    def _doubt(self, stage: int, losses: Tensor, first_losses: Tensor) -> Tensor:
        return 1 * (losses < 0.0).any()
