"""The plot of the REX page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rex_paper
from rex_outcome import HIGH, LOW, Outcome, seven
from rex_ranks import standings
from rex_settings import SCHEDULES
from rex_tables import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"REX": "#0b6bcb", "REX d=0.9": "#74c0fc", "linear": "#d9480f", "cosine": "#2b8a3e"}
COLORS |= {"none": "#868e96", "step": "#862e9c", "plateau": "#e599f7", "exponential": "#5c940d"}
COLORS |= {"OneCycle": "#c92a2a", "delayed 50 %": "#f08c00", "delayed 75 %": "#fcc419"}
COLORS |= {"WSD": "#0c8599"}


def plot(outcome: Outcome) -> Figure:
    """Returns a figure: mean rank by budget of all schedules; mean ranks of seven, with the
    paper's.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        draw_budgets(left, outcome)
        draw_against_paper(right, outcome)
    return figure


def draw_budgets(axes: Axes, outcome: Outcome) -> None:
    budgets = [b for b in LOW + HIGH if any(key[1] == b for key in outcome.tested)]
    by_budget = [standings(outcome.grid(budgets=(budget,))) for budget in budgets]
    for name in SCHEDULES:
        means = [found[name].mean_rank for found in by_budget]
        is_rex = name.startswith(OURS)
        axes.plot(
            range(len(budgets)),
            means,
            "o-",
            color=COLORS[name],
            linewidth=2.5 if is_rex else 1.0,
            markersize=5 if is_rex else 3,
            zorder=3 if is_rex else 2,
            label=name,
        )
    axes.set_xticks(range(len(budgets)), [f"{budget} %" for budget in budgets])
    axes.set_xlabel("budget")
    axes.set_ylabel(f"mean rank of {len(SCHEDULES)} (1 is best)")
    axes.invert_yaxis()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_against_paper(axes: Axes, outcome: Outcome) -> None:
    sides = {
        "these runs": (standings(seven(outcome.grid())), "#0b6bcb", -0.15),
        "the paper, recounted": (standings(rex_paper.printed_grid()), "#adb5bd", 0.15),
    }
    for label, (found, color, offset) in sides.items():
        for height, name in enumerate(rex_paper.SEVEN):
            if name not in found:
                continue
            own = found[name]
            axes.plot([own.low, own.high], [height + offset] * 2, color=color, linewidth=2)
            title = label if height == 0 else None
            axes.plot([own.mean_rank], [height + offset], "o", color=color, label=title)
    axes.set_yticks(range(len(rex_paper.SEVEN)), rex_paper.SEVEN)
    axes.invert_yaxis()
    axes.set_xlabel("mean rank of 7, with 95 % interval")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
