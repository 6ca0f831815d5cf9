"""What a search measures, where it looks next and what it chooses: tensor functions, no sync.

Learning rates are positions on a line here: log10 of the rate, in decades.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrs_ext.autolrs.acquisition import lower_confidence_bound
from lrs_ext.autolrs.surrogate import gp_posterior

Bounds = tuple[float, float]

GRID_POINTS = 512  # candidates between the bounds
TAIL = 2  # the objective of a trial is the mean of the last 1/TAIL of its losses
BAD_MARGIN = 0.1  # a bad trial counts as this share of the best progress above no progress at all
FINE_DECADES = 0.5  # from one fine trial to the next, beginning with the best of the coarse ones
# The best rate falls as the horizon grows: decades a doubling. Measured, see benchmarks/results.
HORIZON_DECADES = 0.04
FAR = 2.0  # times a positive loss: no noise, but a divergence
PAPER_KAPPA = 1.96  # the reference code's 1e6 would ignore the posterior mean


def candidates(bounds: Bounds, device: torch.device) -> Tensor:
    """Returns the positions that are considered, float64, (GRID_POINTS,)."""
    low, high = map(math.log10, bounds)
    return torch.linspace(low, high, GRID_POINTS, dtype=torch.float64, device=device)


def spread(bounds: Bounds, count: int) -> list[float]:
    """Returns `count` positions evenly spread over the bounds, the ends included."""
    low, high = map(math.log10, bounds)
    if count == 1:
        return [(low + high) / 2]
    return [low + (high - low) * index / (count - 1) for index in range(count)]


def next_downhill(positions: Tensor, objectives: Tensor, grid: Tensor) -> Tensor:
    """Returns where to look next: FINE_DECADES beyond the best position if that is an outer one.

    Lower rates come first. Between two others, or at an end of the grid, it is halfway to the
    better neighbour.

    Args:
        positions, objectives: the trials so far, float64, (n,), n >= 1.
        grid: float64, (m,), increasing.
    """
    order = positions.argsort()
    beyond, worst = positions.new_full((1,), FINE_DECADES), positions.new_full((1,), torch.inf)
    tried = positions.index_select(0, order)
    tried = torch.cat((tried[:1] - beyond, tried, tried[-1:] + beyond))
    values = torch.cat((worst, objectives.index_select(0, order), worst))
    best = values.argmin()
    below, middle, above = (_at(tried, best + offset) for offset in (-1, 0, 1))
    is_better_below = _at(values, best - 1) < _at(values, best + 1)
    halfway = 0.5 * (middle + torch.where(is_better_below, below, above))
    goes_up = (best == len(positions)) & (above <= grid[-1])
    goes_down = (best == 1) & (below >= grid[0])
    position = torch.where(goes_down, below, torch.where(goes_up, above, halfway))
    return position.clamp(grid[0], grid[-1])


def tail_mean(losses: Tensor) -> Tensor:
    """Returns the mean of the last half of `losses` (..., n), inf if any of them is not finite.

    One loss that is not finite, wherever it is, means that the trial has diverged.
    """
    tail = losses[..., -max(losses.shape[-1] // TAIL, 1) :].mean(-1)
    return torch.where(losses.isfinite().all(-1), tail, torch.inf)


def capped(objectives: Tensor, start: Tensor) -> Tensor:
    """Returns `objectives` (k,) with all that is worse than no progress made equally bad.

    A diverged trial says where not to go; how far it has gone off says nothing.

    Args:
        start: the loss before any trial, 0-d.
    """
    objectives = objectives.nan_to_num(nan=torch.inf, posinf=torch.inf)
    best = objectives.amin().minimum(start)
    # Finite even if nothing is: then all are equally bad.
    start = torch.where(start.isfinite(), start, 1.0)
    best = torch.where(best.isfinite(), best, start)
    worst = start + BAD_MARGIN * (start - best).clamp(min=1e-6)
    return objectives.minimum(worst)


def next_by_bound(positions: Tensor, objectives: Tensor, noise: Tensor, grid: Tensor) -> Tensor:
    """Returns the position with the smallest lower confidence bound."""
    mean, std = gp_posterior(positions, objectives, noise, grid)
    return _at(grid, lower_confidence_bound(mean, std, PAPER_KAPPA).argmin())


def best_tried(positions: Tensor, objectives: Tensor, noise: Tensor) -> Tensor:
    """Returns the tried position with the smallest posterior mean: not the luckiest one."""
    mean, _ = gp_posterior(positions, objectives, noise, positions)
    return _at(positions, mean.argmin())


def best_between(positions: Tensor, objectives: Tensor, grid: Tensor) -> Tensor:
    """Returns where on the grid, within what was tried, the posterior mean is smallest."""
    mean, _ = gp_posterior(positions, objectives, 0.0, grid)
    was_tried = (grid >= positions.amin()) & (grid <= positions.amax())
    return _at(grid, torch.where(was_tried, mean, torch.inf).argmin())


def for_horizon(position: Tensor, trial_steps: int, train_steps: int) -> Tensor:
    """Returns the peak for `train_steps` updates, given the best one for `trial_steps`."""
    return position - HORIZON_DECADES * math.log2(train_steps / trial_steps)


def rate_at(position: Tensor) -> Tensor:
    """Returns the learning rate at a position."""
    return torch.pow(10.0, position)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.reshape(1)).reshape(())
