"""What AutoLRS has tried, forecast and chosen, as numbers on the host.

A repr leaves the arrays out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrs_ext.autolrs.measurements import Measurements
from lrs_ext.autolrs.presets import Search
from lrs_ext.autolrs.search import rate_at
from lrs_ext.autolrs.shapes import Shapes
from lrs_ext.autolrs.surrogate import gp_posterior

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        lr: the learning rate of the first group.
        start: updates before it, in the whole run; equal for trials that run at once.
        losses: (updates,), those that have run so far.
        objective: what it was judged by, inf if it diverged, NaN if it has not ended.
        deviation: standard deviation of the objective; 0 where it is not estimated.
    """

    lr: float
    start: int
    losses: Array = field(repr=False)
    objective: float
    deviation: float


@dataclass(frozen=True)
class Stage:
    """A search and the training that followed.

    Attributes:
        trials: those that have begun.
        best_lr: what was chosen, NaN if the search has not ended.
        candidates: (m,), learning rates at which the posterior is given.
        posterior_mean, posterior_std: (m,), of the objective; empty before the search has ended.
        start, steps: the training: updates before it, and in it.
        losses: (updates,), those of the training so far.
        horizon: updates after which the objective is meant to be reached, from a trial's start;
            0 if it is no forecast.
    """

    trials: tuple[Trial, ...]
    best_lr: float
    candidates: Array = field(repr=False)
    posterior_mean: Array = field(repr=False)
    posterior_std: Array = field(repr=False)
    start: int
    steps: int
    losses: Array = field(repr=False)
    horizon: int


@dataclass(frozen=True)
class History:
    """A run so far.

    Attributes:
        stages: those that have begun.
        learning_rates: (updates,), of the first group, trials included.
        losses: (updates,), as handed to `AutoLRS.step`, the mean over ranks. Where trials run at
            once, rates and losses are those of the first of them.
        total_steps: the budget in updates.
    """

    stages: tuple[Stage, ...]
    learning_rates: Array = field(repr=False)
    losses: Array = field(repr=False)
    total_steps: int


def read_history(
    search: Search,
    shapes: Shapes,
    measured: Measurements,
    scales: Tensor,
    updates: int,
    base_lr: float,
) -> History:
    """Reads everything from the device.

    Args:
        scales: (segments, looks): what a look for divergence multiplied the rate with.
        updates: done so far.
        base_lr: the peak of a warm-up before the first search.
    """
    timetable = search.timetable
    losses = measured.of_updates(0, updates).double().cpu().numpy()
    of_trials = measured.trials.double().cpu().numpy()
    for segment in timetable.segments:
        if segment.kind == "trial":
            done = max(min(segment.end, updates) - segment.start, 0)
            column = of_trials[segment.stage, :done, segment.trial]
            losses[segment.start : segment.start + done] = column
    track = read_learning_rates(search, shapes, scales, updates, base_lr)
    tried = rate_at(search.positions).cpu().numpy()
    best = rate_at(search.best).cpu().numpy()
    begun = timetable.segments[timetable.index_at(updates)].stage + 1
    stages = tuple(
        _read_stage(search, stage, losses, of_trials[stage], tried[stage], float(best[stage]))
        for stage in range(begun)
    )
    return History(stages, track, losses, timetable.total_steps)


def read_learning_rates(
    search: Search, shapes: Shapes, scales: Tensor, updates: int, base_lr: float
) -> Array:
    """Returns the learning rate of the first group at each update, trials included: (updates,).

    Args:
        scales, updates, base_lr: see `read_history`.
    """
    timetable = search.timetable
    host_scales = scales.cpu().numpy()
    tried = rate_at(search.positions).cpu().numpy()
    best = rate_at(search.best).cpu().numpy()
    track = np.full(updates, np.nan)
    for index, segment in enumerate(timetable.segments):
        done = np.arange(max(min(segment.end, updates) - segment.start, 0))
        rate = {
            "warmup": base_lr,
            "trial": tried[segment.stage, segment.trial],
            "train": best[segment.stage],
        }[segment.kind]
        shape = np.array([shapes.of(segment).at(int(update)) for update in done])
        if segment.kind == "train":
            looks = done // segment.look_steps
            shape = shape * np.concatenate(([1.0], np.cumprod(host_scales[index])))[looks]
        track[segment.start : segment.start + len(done)] = rate * shape
    return track


def _read_stage(
    search: Search, stage: int, losses: Array, of_trials: Array, tried: Array, best: float
) -> Stage:
    trials, train = search.timetable.stage(stage)
    objectives = search.objectives[stage].cpu().numpy()
    deviations = search.deviations[stage].cpu().numpy()
    mean = std = np.empty(0)
    if not np.isnan(best):
        mean, std = (t.cpu().numpy() for t in gp_posterior(*search.seen(stage), search.grid))
    return Stage(
        trials=tuple(
            Trial(
                lr=float(tried[trial]),
                start=segment.start,
                losses=of_trials[: min(segment.steps, len(losses) - segment.start), trial],
                objective=float(objectives[trial]),
                deviation=float(deviations[trial]),
            )
            for segment in trials
            for trial in segment.trials
            if segment.start < len(losses)
        ),
        best_lr=best,
        candidates=rate_at(search.grid).cpu().numpy(),
        posterior_mean=mean,
        posterior_std=std,
        start=train.start,
        steps=train.steps,
        losses=losses[train.start : train.end],
        horizon=train.steps if search.forecasts else 0,
    )
