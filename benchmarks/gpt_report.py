"""What the main job leaves behind: a CSV for each schedule, one picture, a table."""

from __future__ import annotations

import csv
import math
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from gpt_training import History
from matplotlib.figure import Figure  # without pyplot: needs no display

COLORS = ("#0b6bcb", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#846358", "#0c8599", "#5c5f66")
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
INSET = 4  # evaluations enlarged


def write_csv(path: Path, history: History) -> None:
    """One row an update: the rate it used, its training loss, the validation loss after it."""
    validation = dict(history.validation)
    rows = zip(history.learning_rates.tolist(), history.losses.tolist(), strict=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "lr", "train_loss", "val_loss"))
        for step, (lr, loss) in enumerate(rows):
            writer.writerow((step, lr, loss, validation.get(step + 1, "")))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over those of the last ``window`` values that are finite, NaN where none is."""
    is_finite = np.isfinite(values)
    total = np.cumsum(np.concatenate(([0.0], np.where(is_finite, values, 0.0))))
    count = np.cumsum(np.concatenate(([0], is_finite)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    counted = count[end] - count[start]
    return np.where(counted > 0, (total[end] - total[start]) / np.maximum(counted, 1), np.nan)


def draw(path: Path, histories: dict[str, History], title: str) -> None:
    """Losses above, learning rates below; one colour a schedule, the end enlarged to compare.

    Trials of a search are beyond the limits where their losses or learning rates are.
    """
    alone = len(histories) == 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        inset = None if alone else top.inset_axes((0.19, 0.52, 0.37, 0.44))
        highest, lowest, peak = 0.0, math.inf, 0.0
        for color, (schedule, history) in zip(cycle(COLORS), histories.items()):
            losses, rates = (
                np.asarray(v.tolist()) for v in (history.losses, history.learning_rates)
            )
            searched, steps = history.searched, np.arange(len(losses))
            smoothed = smooth(losses[searched:], max(1, len(losses) // 50))
            if alone:
                top.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
            strength = {"linewidth": 1.5} if alone else {"linewidth": 1, "alpha": 0.4}
            top.plot(
                steps[searched:],
                smoothed,
                color=color,
                label="training" if alone else None,
                **strength,
            )
            done, validation = np.asarray(history.validation).T
            label = f"{schedule}: validation {validation[-1]:.4f}"
            style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.2}
            top.plot(done - 1, validation, label=label, **style)
            if inset is not None:
                inset.plot(done[-INSET:] - 1, validation[-INSET:], **style)
            bottom.plot(steps, rates, color=color)
            trained = validation[done > searched]
            trained = trained[np.isfinite(trained)]
            finite = losses[searched:][np.isfinite(losses[searched:])]
            highest = max(highest, smoothed[len(smoothed) // 30], *trained)
            lowest = min(lowest, np.quantile(finite, 0.02), *trained)
            peak = max(peak, rates[searched:].max())
        margin = 0.05 * (highest - lowest)
        top.set_ylim(lowest - margin, highest + margin)  # leaves the first steep steps out
        top.set_ylabel("loss (nats per byte)")
        top.set_title(title)
        top.legend(frameon=False, loc="upper right")
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("step")
        bottom.set_ylim(-0.05 * peak, 1.05 * peak)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for axes in (top, bottom):
            axes.grid(alpha=0.25)
            axes.margins(x=0.01)
        if inset is not None:
            inset.set_title("validation, the end of the run", fontsize=9)
            inset.tick_params(labelsize=8)
            inset.grid(alpha=0.25)
        figure.savefig(path, dpi=150)


def table(histories: dict[str, History]) -> str:
    """One line a schedule, the lowest validation loss first."""
    lines = [f"{'schedule':<16}{'val_loss':>10}{'bits/byte':>11}{'train_loss':>12}{'minutes':>9}"]
    for schedule, history in sorted(histories.items(), key=lambda item: item[1].validation[-1][1]):
        loss = history.validation[-1][1]
        tail = history.losses[-max(1, len(history.losses) // 20) :].mean().item()
        lines.append(
            f"{schedule:<16}{loss:>10.4f}{loss / math.log(2):>11.4f}{tail:>12.4f}"
            f"{history.seconds / 60:>9.1f}"
        )
    return "\n".join(lines)
