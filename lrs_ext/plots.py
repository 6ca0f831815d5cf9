"""Pictures of schedules and of what AutoLRS did. Needs matplotlib: pip install lrs_ext[plot]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from lrs_ext.autolrs.forecast import forecast
from lrs_ext.autolrs.history import History, Stage
from lrs_ext.constructors import named_schedule
from lrs_ext.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, TRIAL, CHOICE = "#0b6bcb", "#e8590c", "#2b8a3e"
MAX_STAGES = 6  # panels; of more stages, the last ones are shown
FORECAST_POINTS = 40
MAX_POINTS = 2000  # of a schedule's curve


def plot_history(history: History) -> Figure:
    """Returns a Figure: the learning rate and the loss over the updates, then one column a stage.

    A stage's column shows the posterior mean and two standard deviations over the learning rate,
    with the trials; below, where the objective is a forecast, the forecasts against the training
    that followed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    searched = [stage for stage in history.stages if len(stage.posterior_mean)][-MAX_STAGES:]
    with_forecasts = any(stage.horizon for stage in searched)
    columns = max(len(searched), 1)
    rows = 2 + bool(searched) + with_forecasts
    figure = _figure(max(8.0, 3.2 * columns), 2.6 * rows)
    grid = figure.add_gridspec(rows, columns)
    rates = figure.add_subplot(grid[0, :])
    _plot_learning_rates(rates, history)
    _plot_losses(figure.add_subplot(grid[1, :], sharex=rates), history)
    for column, stage in enumerate(searched):
        name = "search" if len(history.stages) == 1 else f"stage {history.stages.index(stage) + 1}"
        _plot_posterior(figure.add_subplot(grid[2, column]), stage, name)
        if with_forecasts:
            _plot_forecasts(figure.add_subplot(grid[3, column]), stage)
    return figure


def plot_schedules(schedules: Mapping[str, Schedule], axes: Axes | None = None) -> Figure:
    """Returns a Figure: each schedule's learning rate over its updates.

    Args:
        schedules: by label; one without an end is drawn as far as the longest of the others, and
            alone 1,000 updates further than a row must reach to hold it, a million at most.
        axes: where to draw instead of in a new figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if axes is None:
        axes = _figure(6.4, 3.6).add_subplot()
    _draw(axes, schedules)
    axes.set(xlabel="update", ylabel="learning rate")
    axes.legend(frameon=False, fontsize=8)
    return cast("Figure", axes.figure)


def plot_samplings(
    names: Sequence[str], samplings: Sequence[str | int], total_steps: int = 1000
) -> Figure:
    """Returns a Figure: one panel a sampling rate, side by side, with the named schedules in each.

    Args:
        names: of constructors with a budget, or `constant`; see `named_schedule`.
        samplings: names of `SAMPLING` or numbers of updates.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such schedule or sampling.
    """
    panels = [
        {name: named_schedule(name, total_steps, sampling) for name in names}
        for sampling in samplings
    ]
    figure = _figure(max(4.0 * len(panels), 6.4), 4.0)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel, sampling in zip(grid, panels, samplings, strict=True):
        _draw(axes, panel)
        axes.set(title=sampling if isinstance(sampling, str) else f"every {sampling} updates")
        axes.set(xlabel="update")
    grid[0].set(ylabel="learning rate")
    lines, labels = grid[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw(axes: Axes, schedules: Mapping[str, Schedule]) -> None:
    ends = [s.total_steps for s in schedules.values() if s.total_steps is not None]
    for label, schedule in schedules.items():
        steps = schedule.total_steps or max(ends, default=min(schedule.capacity + 1000, 10**6))
        shown = np.unique(np.linspace(0, steps, MAX_POINTS + 1).astype(int))
        values = [schedule(int(step)) for step in shown]
        axes.step(shown, values, where="post", linewidth=1.5, label=label)
    axes.set_ylim(bottom=0.0)
    axes.margins(x=0.01)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure  # without pyplot: needs no display
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install lrs_ext[plot]") from error
    return Figure(figsize=(width, height), layout="constrained")


def _trials(history: History) -> list[tuple[int, int]]:
    """Returns (start, end) of every trial, in updates."""
    trials = [trial for stage in history.stages for trial in stage.trials]
    return [(trial.start, trial.start + len(trial.losses)) for trial in trials]


def _plot_learning_rates(axes: Axes, history: History) -> None:
    rates = np.where(history.learning_rates > 0.0, history.learning_rates, np.nan)
    steps = np.arange(len(rates))
    trained = rates.copy()
    for start, end in _trials(history):
        trained[start:end] = np.nan
        axes.plot(steps[start:end], rates[start:end], color=TRIAL, linewidth=2)
        axes.axvline(start, ymax=0.04, color=TRIAL, linewidth=0.8)
    axes.plot(steps, trained, color=TRAIN, label="training")
    axes.plot([], [], color=TRIAL, linewidth=2, label="trials, rolled back")
    axes.set(ylabel="learning rate", yscale="log", xlim=(0, history.total_steps))
    axes.legend(frameon=False, fontsize=8)


def _plot_losses(axes: Axes, history: History) -> None:
    steps = np.arange(len(history.losses))
    losses = np.where(np.isfinite(history.losses), history.losses, np.nan)
    trained = losses.copy()
    for start, end in _trials(history):
        trained[start:end] = np.nan
        axes.plot(steps[start:end], losses[start:end], color=TRIAL, linewidth=0.8)
    axes.plot(steps, trained, color=TRAIN, linewidth=0.8)
    axes.set(ylabel="loss", xlabel="update, trials included")
    visible = trained[np.isfinite(trained)]
    if len(visible):
        low, high = np.quantile(visible, (0.0, 0.99))
        axes.set_ylim(low - 0.05 * (high - low) - 1e-12, high + 0.3 * (high - low) + 1e-12)


def _plot_posterior(axes: Axes, stage: Stage, name: str) -> None:
    mean, std, rates = stage.posterior_mean, stage.posterior_std, stage.candidates
    axes.fill_between(rates, mean - 2 * std, mean + 2 * std, color=TRAIN, alpha=0.15, linewidth=0)
    axes.plot(rates, mean, color=TRAIN, label="mean, 2 sigma")
    low, high = (mean - 2 * std).min(), (mean + 2 * std).max()
    margin = 0.05 * (high - low)
    objectives = np.array([trial.objective for trial in stage.trials])
    shown = np.clip(np.nan_to_num(objectives, nan=high, posinf=high), low, high)
    tried = np.array([trial.lr for trial in stage.trials])
    axes.plot(tried, shown, "o", color=TRIAL, markersize=4, label="trials")
    axes.axvline(stage.best_lr, color=CHOICE, linewidth=1, label=f"chosen: {stage.best_lr:.2e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="objective", title=name)
    axes.set_ylim(low - margin, high + margin)
    axes.legend(frameon=False, fontsize=8)


def _plot_forecasts(axes: Axes, stage: Stage) -> None:
    """Each trial's forecast in the units of a stage, and the training at the chosen rate."""
    for trial in stage.trials:
        losses = torch.from_numpy(trial.losses)
        if not trial.objective < np.inf:
            continue
        horizons = torch.linspace(len(losses) - 1, stage.horizon, FORECAST_POINTS)
        mean, _ = forecast(losses.expand(FORECAST_POINTS, -1), horizons.to(losses))
        axes.plot(horizons, mean, color=TRIAL, alpha=0.5, linewidth=0.8)
    steps = np.arange(len(stage.losses))
    axes.plot(steps, stage.losses, color=TRAIN, linewidth=0.8, label="what came")
    axes.plot([], [], color=TRIAL, linewidth=0.8, label="forecasts of the trials")
    axes.set(xlabel="update of the stage", ylabel="loss")
    axes.legend(frameon=False, fontsize=8)
