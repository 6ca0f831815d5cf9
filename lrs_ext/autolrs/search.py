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
JUDGED_PERCENT = 30  # of a trial's losses, the last ones: their mean is its objective
BAD_MARGIN = 0.1  # a bad trial counts as this share of the best progress above no progress at all
NO_PROGRESS = 1e-6  # share of the loss that counts as progress where there is none
# The best rate of a short trial is too high for a long run. How much varies with the width of the
# range of rates above it that do nearly as well. Measured, see benchmarks/results.
NEARLY = 0.1  # share of the best progress that a rate may lose and still do nearly as well
UNSEEN = 0.5  # least width of a range whose end was not tried, in gaps between trials
MARGIN_DECADES = 0.1  # on top
VALLEY_LENGTHSCALES = (0.6, 1.2, 2.4)  # decades: what looks narrower, a few losses have made up
RIDGE = 0.5  # share of the progress of lower rates that a rate may lose; beyond, luck decides
VISIBLE = 0.05  # standard deviations of the loss from batch to batch: less may be noise
SAME_LOSS = 1e-3  # relative: more than kernels with another order of sums make of one batch
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


def next_downhill(positions: Tensor, objectives: Tensor) -> Tensor:
    """Returns where to look next: halfway from the best position to its better neighbour.

    Args:
        positions, objectives: the trials so far, float64, (n,), n >= 2.
    """
    order = positions.argsort()
    edge = positions.new_full((1,), torch.inf)
    tried = positions.index_select(0, order)
    values = torch.cat((edge, objectives.index_select(0, order), edge))
    best = values[1:-1].argmin()
    below, above = _at(values, best), _at(values, best + 2)
    is_lowest, is_highest = best == 0, best == len(positions) - 1
    goes_down = ~is_lowest & (is_highest | (below < above))
    neighbour = best + torch.where(goes_down, -1, 1)
    return 0.5 * (_at(tried, best) + _at(tried, neighbour))


def tail_mean(losses: Tensor, percent: int) -> Tensor:
    """Returns the mean of the last `percent` of `losses` (..., n), inf if any is not finite.

    One loss that is not finite, wherever it is, means that the trial has diverged.
    """
    tail = losses[..., -max(losses.shape[-1] * percent // 100, 1) :].mean(-1)
    return torch.where(losses.isfinite().all(-1), tail, torch.inf)


def noise_std(losses: Tensor) -> Tensor:
    """Returns how much losses (n,) differ from batch to batch, 0-d, 0 if one is not finite."""
    std = losses.std(correction=0)
    return torch.where(std.isfinite(), std, 0.0)


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
    progress = (start - best).maximum(NO_PROGRESS * start.abs())
    worst = start + BAD_MARGIN * progress
    return objectives.minimum(worst)


def first_valley(positions: Tensor, objectives: Tensor, start: Tensor) -> Tensor:
    """Returns `objectives` (k,) with those beyond a ridge no better than no progress.

    A rate above one that loses RIDGE of the progress made at lower ones may recover by luck.

    Args:
        positions: of the trials, (k,), in any order.
        start: the loss before any trial, 0-d.
    """
    order = positions.argsort()
    values = objectives.index_select(0, order)
    least = values.cummin(0).values
    is_ridge = values > least + RIDGE * (start - least).clamp(min=0.0)
    is_beyond = (is_ridge.cumsum(0) > 0).index_select(0, order.argsort())
    return torch.where(is_beyond, objectives.maximum(start), objectives)


def are_unpaired(first_losses: Tensor, start: Tensor, best: Tensor) -> Tensor:
    """Returns whether trials saw batches so different that these decide between them, bool, 0-d.

    Args:
        first_losses: of each trial, (k,), all from the same state.
        start: the loss before any trial, 0-d.
        best: the lowest objective, 0-d.
    """
    difference = first_losses.amax() - first_losses.amin()
    return (difference > NEARLY * (start - best)) & (difference > SAME_LOSS * start.abs())


def next_by_bound(positions: Tensor, objectives: Tensor, noise: Tensor, grid: Tensor) -> Tensor:
    """Returns the position with the smallest lower confidence bound."""
    # Equal objectives count as std 1, which must not depend on the unit of the loss.
    largest = objectives.abs().amax()
    unit = torch.where(largest > 0.0, largest, 1.0)
    mean, std = gp_posterior(positions, objectives / unit, noise / unit, grid)
    return _at(grid, lower_confidence_bound(mean, std, PAPER_KAPPA).argmin())


def expected(positions: Tensor, objectives: Tensor, at: Tensor) -> Tensor:
    """Returns the posterior mean at a position, (1,), as in `peak_between`: 0-d."""
    mean, _ = gp_posterior(positions, objectives, 0.0, at, lengthscales=VALLEY_LENGTHSCALES)
    return mean.squeeze(0)


def best_tried(positions: Tensor, objectives: Tensor, noise: Tensor) -> Tensor:
    """Returns the tried position with the smallest posterior mean: not the luckiest one."""
    mean, _ = gp_posterior(positions, objectives, noise, positions)
    return _at(positions, mean.argmin())


def peak_between(
    positions: Tensor, objectives: Tensor, start: Tensor, grid: Tensor, gap: float
) -> Tensor:
    """Returns the peak for a long run: as far below the best position as others nearly as good go
    above it, and MARGIN_DECADES more.

    The best position is where on the grid, within what was tried, the posterior mean is smallest.

    Args:
        positions, objectives: of the trials, float64, (n,).
        start: the loss before any trial, 0-d.
        grid: float64, (m,), increasing.
        gap: decades between the trials that were spread over the bounds: the first bad rate above
            the highest one may lie anywhere in the next gap.
    """
    mean, _ = gp_posterior(positions, objectives, 0.0, grid, lengthscales=VALLEY_LENGTHSCALES)
    was_tried = (grid >= positions.amin()) & (grid <= positions.amax())
    mean = torch.where(was_tried, mean, torch.inf)
    least, index = mean.min(0)
    best = _at(grid, index)
    limit = least + NEARLY * (start - least).clamp(min=0.0)
    is_beyond = (grid > best) & (mean > limit) & was_tried
    end = torch.where(is_beyond, grid, torch.inf).amin()
    unseen = (positions.amax() - best).clamp(min=UNSEEN * gap)
    width = torch.where(end.isfinite(), end - best, unseen)
    return torch.maximum(best - width - MARGIN_DECADES, grid[0])


def rate_at(position: Tensor) -> Tensor:
    """Returns the learning rate at a position."""
    return torch.pow(10.0, position)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.reshape(1)).reshape(())
