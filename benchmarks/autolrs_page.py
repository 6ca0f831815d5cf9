"""What bench_autolrs.py measured, as tables, a page and a plot.

A row is one run: ``task``, ``contestant``, ``options`` (JSON), ``total_steps``, ``seed``,
``test_loss``, ``processor_seconds``, ``search_share``, ...; or, instead of numbers, ``error``.
Losses are compared seed by seed: initial model, data and their order are the same.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machines
import numpy as np
import torch
from autolrs_contestants import CONTESTANTS, DECADES, GRID, GRIDDED
from autolrs_tasks import TASKS
from results_page import FOLDER, bullets, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

BASELINE = "cosine, best of grid"
AUTO = "AutoLRS"
RIVALS = (BASELINE, "prodigy", "dadapt", "schedulefree", "greedy", "onecycle")
CPU = torch.device("cpu")
OUR_COLOR, THEIR_COLOR = "#0b6bcb", "#495057"
PLOT_LIMITS, PLOT_TICKS = (0.8, 2.0), (0.8, 0.9, 1.0, 1.2, 1.5, 2.0)  # beyond them, at the edge
INTRODUCTION = """\
{runs} runs on {device}, torch {torch}, one thread each; written by `benchmarks/bench_autolrs.py`.
Every method has the same number of updates in all, whatever it spends on finding the learning
rate, and the same initial model, batches and their order for a seed. "Best of grid" is the peak
with the lowest mean **test** loss of 9 peaks over 4 decades: an oracle that costs 9 runs and looks
at the test set. The range of rates depends on the kind of optimizer alone, not on the task.
AutoLRS was designed on these tasks, with seeds 10 to 14 and 30 to 37; seeds 0 to 4 and 20 to 24
were looked at before its last details were settled, seeds 40 to 42 only afterwards.

- **relative**: test loss over that of the cosine schedule, best of grid, seed by seed; the mean,
  its standard deviation over seeds (+-) and the worst seed.
- **seeds**: not all methods have been measured with the same ones; each is compared with the
  baseline's runs of its own seeds, and two methods in the list of losses by those that both have.
- **time**: processor time over the baseline's, median over seeds. The machine was busy with other
  work, more at some times than at others: a rough number.
- **search**: share of the updates spent on finding the learning rate.
- A run whose test loss is not finite, or above twice the untrained model's, has diverged and counts
  as twice the untrained model's: {diverged} runs."""
ABLATIONS = """\
Test loss over that of AutoLRS as it is, by task; a name with a dot is a constant of
`lrs_ext.autolrs`."""
MISSES = (1.05, 1.15)  # times the baseline's loss
WRONG = {-1.0: "cosine, 10x too low", 1.0: "cosine, 10x too high"}


@dataclass(frozen=True)
class Cell:
    """The runs of one method in one task and budget, by seed."""

    label: str
    runs: dict[int, Row]
    knobs: str
    is_ablation: bool = False

    @property
    def mean(self) -> float:
        return float(np.mean([run["test_loss"] for run in self.runs.values()]))

    def ratios(self, baseline: Cell, what: str = "test_loss") -> list[float]:
        """Returns this over the baseline's, seed by seed, for the seeds that both have."""
        common = sorted(self.runs.keys() & baseline.runs.keys())
        return [self.runs[seed][what] / max(baseline.runs[seed][what], 1e-12) for seed in common]

    def relative(self, baseline: Cell) -> float:
        ratios = self.ratios(baseline)
        return float(np.mean(ratios)) if ratios else math.nan


Grid = dict[tuple[str, str], Cell]  # by contestant and options


def by_task_and_budget(rows: Sequence[Row]) -> dict[tuple[int, str], Grid]:
    """Returns the cells of every budget and task, in order."""
    found: dict[tuple[int, str], dict[tuple[str, str], dict[int, Row]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        if "error" not in row:
            method = (row["contestant"], row["options"])
            found[row["total_steps"], row["task"]][method][row["seed"]] = row
    order = list(TASKS)
    return {
        place: {method: make_cell(*method, runs) for method, runs in found[place].items()}
        for place in sorted(found, key=lambda place: (place[0], order.index(place[1])))
    }


def make_cell(contestant: str, options: str, runs: dict[int, Row]) -> Cell:
    entry = CONTESTANTS[contestant]
    own = {k: v for k, v in json.loads(options).items() if entry.defaults.get(k) != v}
    name = {"auto": AUTO, "paper": f'{AUTO}, preset="paper"'}.get(contestant, contestant)
    words = [name]
    for option, value in own.items():
        words.append(f"{value:g} decades" if option == "decades" else f"{option}={value}")
    is_ablation = contestant in ("auto", "paper") and bool(own.keys() - {"decades"})
    return Cell(", ".join(words), runs, entry.knobs, is_ablation)


def best_cell(grid: Grid, contestant: str) -> tuple[float, Cell] | None:
    """Returns the best peak of a schedule by mean test loss, and its runs.

    Of the peaks with equally many seeds as the one with most of them.
    """
    cells = {
        json.loads(options)["offset"]: cell
        for (name, options), cell in grid.items()
        if name == contestant
    }
    if not cells:
        return None
    most = max(len(cell.runs) for cell in cells.values())
    return min(
        ((offset, cell) for offset, cell in cells.items() if len(cell.runs) == most),
        key=lambda pair: pair[1].mean,
    )


def best_offset(rows: Sequence[Row], task: str, total_steps: int, contestant: str) -> float | None:
    """Returns the best peak of a schedule, in decades from the middle of the range."""
    found = best_cell(by_task_and_budget(rows).get((total_steps, task), {}), contestant)
    return None if found is None else found[0]


def line_up(grid: Grid) -> list[Cell]:
    """Returns what is compared, the baseline first; empty where it is missing."""
    best = best_cell(grid, "cosine")
    if best is None:
        return []
    offset, cosine = best
    cells = [Cell(BASELINE, cosine.runs, cosine.knobs)]
    for contestant in GRIDDED[1:]:
        found = best_cell(grid, contestant)
        if found is not None:
            cells.append(Cell(f"{contestant}, best of grid", found[1].runs, found[1].knobs))
    for wrong, label in WRONG.items():
        cell = grid.get(("cosine", json.dumps({"offset": offset + wrong})))
        if cell is not None:
            cells.append(Cell(label, cell.runs, "a peak, wrong"))
    others = [cell for (name, _), cell in grid.items() if name not in GRIDDED]
    order = list(CONTESTANTS)
    names = [name for name, _ in grid if name not in GRIDDED]
    ranked = sorted(zip(names, others, strict=True), key=lambda p: (order.index(p[0]), p[1].label))
    return cells + [cell for _, cell in ranked]


def summary(rows: Sequence[Row]) -> str:
    """Returns a table for each budget: loss over the tuned cosine's, by method and task."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for (budget, task), grid in by_task_and_budget(rows).items():
        methods = found.setdefault(budget, {})
        cells = line_up(grid)
        for cell in cells:
            methods.setdefault(cell.label, {})[task] = cell.relative(cells[0])
    return ratio_tables("method", found) or "Nothing to compare with: run cosine, too."


def ratio_tables(what: str, found: dict[int, dict[str, dict[str, float]]]) -> str:
    """Returns a table for each budget of ratios by label and task, with their geometric mean."""
    parts = []
    for budget, by_label in found.items():
        tasks = list(dict.fromkeys(task for by_task in by_label.values() for task in by_task))
        lines = []
        for label, by_task in by_label.items():
            values = [by_task.get(task, math.nan) for task in tasks]
            lines.append((label, *map(ratio, [*values, math.exp(np.mean(np.log(values)))])))
        if lines:
            parts += [f"### {budget:,} updates", table((what, *tasks, "mean"), lines)]
    return "\n\n".join(parts)


def ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


# The page


def write(rows: Sequence[Row], folder: Path = FOLDER) -> list[Path]:
    """Writes autolrs.json, autolrs.md and autolrs.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"autolrs.{ending}" for ending in ("json", "md", "png")]
    paths[0].write_text(json.dumps(document(rows)) + "\n", encoding="utf-8")
    paths[1].write_text(render(rows), encoding="utf-8")
    plot(rows).savefig(paths[2], dpi=110)
    return paths


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the numbers without what can be computed from them."""
    kept = ("seed", "test_loss", "validation_loss", "processor_seconds", "seconds", "updates", "lr")
    kept += ("search_share", "diverged")
    cells = []
    for (budget, task), grid in by_task_and_budget(rows).items():
        for (contestant, options), cell in grid.items():
            runs = [cell.runs[seed] for seed in sorted(cell.runs)]
            columns = {name: [rounded(run.get(name)) for run in runs] for name in kept}
            place = {"task": task, "total_steps": budget, "contestant": contestant}
            cells.append(place | {"options": json.loads(options)} | columns)
    return {"machine": machines.machine(CPU), "runs": cells}


def rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def render(rows: Sequence[Row]) -> str:
    """Returns the page in Markdown."""
    places = by_task_and_budget(rows)
    good = [row for row in rows if "error" not in row]
    machine = machines.machine(CPU)
    parts = [
        "# AutoLRS against schedules with a tuned peak, and against other methods",
        INTRODUCTION.format(
            runs=f"{len(good):,}",
            device=machine["device"],
            torch=machine["torch"],
            diverged=f"{sum(row['diverged'] for row in good):,}",
        ),
        "![Loss over that of the tuned cosine schedule](autolrs.png)",
        "## All tasks",
        "Test loss over that of the tuned cosine schedule; the mean is geometric.",
        summary(rows),
        "## How often a run misses",
        "Share of single runs, of all tasks, with so many times the tuned cosine schedule's loss.",
        failure_table(places),
        "## Where AutoLRS loses",
        losses(places),
    ]
    for (budget, task), grid in places.items():
        parts += [f"## {TASKS[task].title}; {budget:,} updates", place_table(grid)]
    ablations = ablation_tables(places)
    if ablations:
        parts += ["## Ablations", ABLATIONS, ablations]
    notes = page_notes(rows, places)
    if notes:
        parts += ["## Notes", bullets(notes)]
    return "\n\n".join(parts) + "\n"


def place_table(grid: Grid) -> str:
    """Returns all methods of a task and budget."""
    cells = line_up(grid)
    if not cells:
        return "No cosine to compare with."
    header = ("method", "test loss", "relative", "+-", "worst seed", "seeds", "time", "search")
    lines = []
    for cell in cells:
        if cell.is_ablation:
            continue
        ratios = cell.ratios(cells[0])
        times = cell.ratios(cells[0], "processor_seconds")
        runs = cell.runs.values()
        diverged = sum(run["diverged"] for run in runs)
        lines.append(
            (
                cell.label,
                f"{cell.mean:.4f}" + (f" ({diverged} diverged)" if diverged else ""),
                ratio(cell.relative(cells[0])),
                ratio(float(np.std(ratios, ddof=1)) if len(ratios) > 1 else math.nan),
                ratio(max(ratios, default=math.nan)),
                seed_ranges(cell.runs.keys() & cells[0].runs.keys()),
                f"{np.median(times):.2f}" if times else "-",
                f"{np.mean([run['search_share'] for run in runs]):.0%}",
                cell.knobs,
            )
        )
    return table((*header, "the user supplies"), lines)


def seed_ranges(seeds: Iterable[int]) -> str:
    """Returns seeds in words.

    >>> seed_ranges({0, 1, 2, 20, 40, 41})
    '0-2, 20, 40-41'
    """
    ranges: list[list[int]] = []
    for seed in sorted(seeds):
        if ranges and seed == ranges[-1][-1] + 1:
            ranges[-1][1:] = [seed]
        else:
            ranges.append([seed])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)


def failure_table(places: dict[tuple[int, str], Grid]) -> str:
    """Returns, for each budget and method, how many runs of all tasks miss the baseline by much."""
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for (budget, _), grid in places.items():
        cells = line_up(grid)
        for cell in cells[1:]:
            if not cell.is_ablation:
                found[budget, cell.label] += cell.ratios(cells[0])
    header = ("updates", "method", "runs", *(f"above {limit:g}" for limit in MISSES), "worst")
    lines = []
    for (budget, label), ratios in found.items():
        if not ratios:
            continue
        shares = [f"{np.mean(np.greater(ratios, limit)):.0%}" for limit in MISSES]
        lines.append((f"{budget:,}", label, str(len(ratios)), *shares, ratio(max(ratios))))
    return table(header, lines)


def losses(places: dict[tuple[int, str], Grid]) -> str:
    """Lists where AutoLRS is behind the tuned cosine or a method that needs no tuning.

    A difference counts as noise if it is within twice its standard error over the seeds.
    """
    behind, compared = [], 0
    for (budget, task), grid in places.items():
        cells = line_up(grid)
        ours = next((cell for cell in cells if cell.label == AUTO), None)
        for rival in cells if ours is not None else ():
            ratios = ours.ratios(rival)
            if not ratios or rival.label not in RIVALS:
                continue
            compared += 1
            excess = float(np.mean(ratios)) - 1.0
            if excess <= 0.0:
                continue
            place = f"{task}, {budget:,} updates: {excess:.1%} behind {rival.label}"
            if len(ratios) == 1:
                place += ", one seed"
            elif excess < 2.0 * np.std(ratios, ddof=1) / math.sqrt(len(ratios)):
                place += ", within noise"
            behind.append(place)
    if not compared:
        return "Nothing was compared."
    rivals = ", ".join(RIVALS[1:])
    count = (
        f"AutoLRS as it is, with bounds {DECADES:g} decades wide, has the higher mean test loss in "
        f"{len(behind)} of {compared} comparisons with {BASELINE}, and with {rivals}."
    )
    return "\n\n".join([count, *([bullets(behind)] if behind else [])])


def ablation_tables(places: dict[tuple[int, str], Grid]) -> str:
    """Returns, for each budget, the variants of AutoLRS over AutoLRS as it is, by task."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for (budget, task), grid in places.items():
        variants = found.setdefault(budget, {})
        plain = next((cell for cell in grid.values() if cell.label == AUTO), None)
        for cell in sorted(grid.values(), key=lambda cell: cell.label):
            if cell.is_ablation and plain is not None:
                variants.setdefault(cell.label, {})[task] = cell.relative(plain)
    return ratio_tables("variant", found)


def page_notes(rows: Sequence[Row], places: dict[tuple[int, str], Grid]) -> list[str]:
    """Returns what a reader must know about how these rows came about."""
    notes = []
    versions = {
        row["code"] for row in rows if row["contestant"] in ("auto", "paper") and "code" in row
    }
    if len(versions) > 1:
        notes.append(f"Results of {len(versions)} versions of AutoLRS are mixed: run them again.")
    for (budget, task), grid in places.items():
        best = best_cell(grid, "cosine")
        if best is not None and abs(best[0]) == max(GRID):
            notes.append(f"{task}, {budget:,} updates: the best peak is at the edge of the grid")
    present = {row["contestant"] for row in rows}
    notes += [
        f"{name}: not run (pip install {contestant.package})"
        for name, contestant in CONTESTANTS.items()
        if contestant.needs and name not in present
    ]
    failed = Counter((row["contestant"], row["error"]) for row in rows if "error" in row)
    notes += [f"{name}: {count} runs failed: {error}" for (name, error), count in failed.items()]
    return notes


def plot(rows: Sequence[Row]) -> Figure:
    """Returns a figure: a column a budget, a row a task, one dot a seed, a bar at the mean."""
    from matplotlib.figure import Figure

    places = by_task_and_budget(rows)
    budgets = sorted({budget for budget, _ in places})
    tasks = [task for task in TASKS if any(name == task for _, name in places)]
    labels = list(
        dict.fromkeys(
            cell.label for grid in places.values() for cell in line_up(grid) if not cell.is_ablation
        )
    )
    figure = Figure(
        figsize=(2.2 + 2.8 * max(len(budgets), 1), (0.6 + 0.17 * len(labels)) * max(len(tasks), 1)),
        layout="constrained",
    )
    if not labels:
        return figure
    axes = figure.subplots(len(tasks), len(budgets), sharex=True, sharey=True, squeeze=False)
    for row, task in enumerate(tasks):
        for column, budget in enumerate(budgets):
            panel = axes[row][column]
            draw_place(panel, places.get((budget, task), {}), labels)
            if row == 0:
                panel.set_title(f"{budget:,} updates", fontsize=9)
            if column == 0:
                panel.set_ylabel(task)
    figure.supxlabel("test loss over that of the cosine schedule with a tuned peak", fontsize=9)
    return figure


def draw_place(panel: Axes, grid: Grid, labels: Sequence[str]) -> None:
    """Draws the methods of one task and budget."""
    cells = line_up(grid)
    for cell in cells:
        if cell.is_ablation:
            continue
        height = labels.index(cell.label)
        color = OUR_COLOR if cell.label.startswith(AUTO) else THEIR_COLOR
        shown = np.clip(cell.ratios(cells[0]), *PLOT_LIMITS)
        panel.plot(shown, [height] * len(shown), ".", color=color, markersize=4, alpha=0.5)
        mean = np.clip(cell.relative(cells[0]), *PLOT_LIMITS)
        panel.plot([mean], [height], "|", color=color, markersize=9, markeredgewidth=2)
    panel.axvline(1.0, color="#adb5bd", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_xlim(PLOT_LIMITS[0] * 0.98, PLOT_LIMITS[1] * 1.02)
    panel.set_xticks(PLOT_TICKS, [f"{tick:g}" for tick in PLOT_TICKS])
    panel.minorticks_off()
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.tick_params(labelsize=7)
    panel.grid(axis="x", linewidth=0.3)
