"""What bench_rex.py found, as a page, a plot and a file of numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import machines
import rex_paper
import rex_plot
import rex_tables
import torch
from results_page import FOLDER, bullets, table
from rex_outcome import Outcome, seven
from rex_ranks import Standing, critical_difference, duel, friedman_p, standings
from rex_runs import Job, Row
from rex_settings import (
    EVERY_ITERATION,
    LR_FACTOR,
    PLATEAU_CHECKS,
    PLATEAU_FACTOR,
    SCHEDULES,
    SETTINGS,
)

CPU = torch.device("cpu")
OURS = rex_tables.OURS
INTRODUCTION = """\
Independent runs of what Tables 1 and 2 of the REX paper (Chen, Wolfe, Kyrillidis,
[arXiv 2107.04197](https://arxiv.org/abs/2107.04197)) claim, on small models. The paper's models
and data are others: what can be compared is the order of the schedules, not a number.

{models:,} models of {jobs} stacks on {device}, torch {torch}; written by
`python benchmarks/bench_rex.py` and `--report`.

- **Budgets** are percent of the largest one of a setting; every schedule decays within the budget
  at hand. There is no warm-up, as in the paper (but for its YOLO). The budgets are those of small
  machines: the paper's 1 % is three epochs of CIFAR, here it is a few updates.
- **Learning rates** are tuned for each schedule, setting and budget in multiples of {factor:g}, on
  validation data, with a seed of its own ({tuning}); a grid whose best rate is at its edge is
  widened. Then seeds {seeds} are trained, and the test set is looked at once, at their end.
- **none, linear, cosine, exponential** (exp(-3 p)), **step** (a tenth at 50 and at 75 %),
  **OneCycle** (from a tenth to the peak and back, momentum .95 to .85 and back), **delayed**
  (constant up to 50 or 75 %, then linear), **REX** (d = 0.5, the paper's curve), **REX d=0.9** (its
  authors' later code), **WSD** (the last 10 % by 1 - sqrt q): the constructors of `lrs_ext` as they
  are.
- **plateau** is `lrs_ext.ReduceOnPlateau`, factor {plateau:g}, on the loss over a part of the
  validation set, {checks} times a run; its patience is tuned too: 5 or 10 % of the budget (the
  paper: multiples of 5 epochs, whatever the budget).
- **Ranks**: 1 + the number of schedules with a better mean over the seeds; ties share the better
  rank. In the comparison with the paper, plateau counts as step, the better of the two, as there.
- **95 %** intervals draw the places (a setting and budget) again with replacement. Budgets of one
  setting share model and data, so the intervals are rather too narrow."""
TABLE_1 = """\
Percent of the places where a schedule is the best / among the best three. Low budgets are 1, 5 and
10 %, high ones 25, 50 and 100 %. "By seed" takes the test metrics of one seed at a time. The last
column counts the paper's own tables again: they do not quite give its printed percentages."""
TABLE_2 = """\
The profile and how often the learning rate is sampled from it, at one learning rate for all of a
place: the one that was best in tuning for exponential, linear and REX on average. "step-like" is
the exponential profile exp(-4.6 p) that the paper's Table 2 calls step (its exponent is read off
the paper's Figure 2). Bold: best of a row; +- is the standard deviation over seeds. With 100
updates every 1 % is every iteration."""
SPEED = """\
Updates of one model per second of processor time (one thread, the best of three rounds). "Plain
loop" is what one process a core can do: one module, autograd and an optimizer of `lrs_ext`. A stack
trains many models at once: `torch.func.vmap` over stacked parameters for the forward pass, one
backward pass for all, one optimizer whose parameter groups are the models."""


def write(
    outcome: Outcome,
    results: Mapping[Job, Row],
    speed: list[dict[str, Any]],
    folder: Path = FOLDER,
) -> list[Path]:
    """Writes rex.json, rex.md and rex.png; returns their paths."""
    used = [results[job] for job in used_jobs(outcome, results)]
    machine = machines.machine(CPU)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"rex.{ending}" for ending in ("json", "md", "png")]
    paths[0].write_text(in_lines(document(outcome, used, speed, machine)), encoding="utf-8")
    paths[1].write_text(render(outcome, used, speed, machine), encoding="utf-8")
    rex_plot.plot(outcome).savefig(paths[2], dpi=120)
    return paths


def used_jobs(outcome: Outcome, results: Mapping[Job, Row]) -> list[Job]:
    """Returns the jobs whose results count, in the order of the plan."""
    return [job for job in outcome.jobs if job in results]


def document(
    outcome: Outcome, used: list[Row], speed: list[dict[str, Any]], machine: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the runs, from which all else follows, and the main numbers."""
    grids = {"twelve": outcome.grid(), "seven": seven(outcome.grid())}
    summary = {
        which: {name: rounded(standing) for name, standing in standings(grid).items()}
        for which, grid in grids.items()
    }
    return {
        "machine": dict(machine),
        "scale": dataclasses.asdict(outcome.scale),
        "missing": [list(key) for key in outcome.missing],
        "summary": summary,
        "speed": speed,
        "jobs": [compact(row) for row in used],
    }


def rounded(standing: Standing) -> dict[str, float]:
    return {key: round(value, 4) for key, value in dataclasses.asdict(standing).items()}


def compact(row: Row) -> Row:
    """Returns a result in fewer letters: seven digits are all that a float32 has."""
    shorter = dict(row)
    shorter["runs"] = [
        list(run[:2] if run[2:] == (EVERY_ITERATION,) else run) for run in map(tuple, row["runs"])
    ]
    for name in ("validation", "test"):
        if name in row:
            shorter[name] = [v if v is None else float(f"{v:.7g}") for v in row[name]]
    return shorter


def in_lines(content: dict[str, Any]) -> str:
    """Returns JSON with a line for each job."""
    *others, jobs = content.items()
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in others]
    lines = ",\n".join(map(json.dumps, jobs[1]))
    return "{" + ",\n".join([*parts, f'"{jobs[0]}": [\n{lines}\n]']) + "}\n"


def render(
    outcome: Outcome, used: list[Row], speed: list[dict[str, Any]], machine: Mapping[str, str]
) -> str:
    """Returns the page in Markdown."""
    scale = outcome.scale
    introduction = INTRODUCTION.format(
        models=sum(len(row["runs"]) for row in used),
        jobs=len(used),
        device=machine["device"],
        torch=machine["torch"],
        factor=LR_FACTOR,
        tuning=in_words(scale.tuning_seeds),
        seeds=in_words(scale.seeds),
        plateau=PLATEAU_FACTOR,
        checks=PLATEAU_CHECKS,
    )
    parts = ["# REX against the paper's schedules, and against later ones", introduction]
    parts += [rex_tables.settings_table(scale)]
    if outcome.missing:
        parts += [f"**Not finished**, and so not in any table: {missing_places(outcome)}."]
    if not outcome.tested:
        return "\n\n".join([*parts, "Nothing to compare yet."]) + "\n"
    parts += ["## In short", bullets(in_short(outcome))]
    parts += ["![Mean ranks by budget, and against the paper's](rex.png)"]
    parts += ["## Table 1, beside the paper's", TABLE_1, rex_tables.shares_table(outcome)]
    parts += ["Mean ranks of the seven (GLUE counts as high):", rex_tables.rank_table(outcome)]
    parts += ["## All twelve schedules", rex_tables.twelve_table(outcome), chance(outcome)]
    parts += ["## REX against each", rex_tables.duel_table(outcome)]
    losses = rex_tables.not_first(outcome)
    count = f"Of all twelve schedules another is better in {len(losses)} of {len(outcome.tested)}."
    parts += ["## Where REX does not win", count, *([bullets(losses)] if losses else [])]
    parts += profile_parts(outcome)
    parts += ["## Test metrics and tuned learning rates"]
    parts += ["Mean over seeds +- standard deviation, peak learning rate. Bold: best of a column."]
    for name, setting in SETTINGS.items():
        if any(key[0] == name for key in outcome.tested):
            heading = f"### {setting.task.title}: {setting.metric_name}"
            parts += [heading, rex_tables.setting_table(outcome, name)]
    parts += ["## How it was run", how_run(used)]
    parts += [SPEED, speed_table(speed), speed_choice(speed)] if speed else []
    notes = page_notes(outcome)
    parts += ["## Notes", bullets(notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def missing_places(outcome: Outcome) -> str:
    """Returns the places that are not finished, by setting."""
    by_setting: dict[str, list[int]] = {}
    for name, budget in outcome.missing:
        by_setting.setdefault(name, []).append(budget)
    return "; ".join(f"{name}: {in_words(budgets)} %" for name, budgets in by_setting.items())


def in_words(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def in_short(outcome: Outcome) -> list[str]:
    """Returns the findings, each computed from the runs."""
    mine, all_of = standings(seven(outcome.grid())), standings(outcome.grid())
    printed = rex_paper.printed_shares()[OURS, "overall"]
    count = len(outcome.tested)
    best = next(iter(all_of))
    limit = critical_difference(len(SCHEDULES), count)
    alike = [
        name
        for name, standing in all_of.items()
        if name != OURS and abs(standing.mean_rank - all_of[OURS].mean_rank) < limit
    ]
    lines = [
        f"Of the paper's seven schedules REX is the best in {mine[OURS].first:.0f} % of {count} "
        f"places and among the best three in {mine[OURS].top_three:.0f} % (paper: {printed[0]:.0f}"
        f" and {printed[1]:.0f} %); mean rank {mine[OURS].mean_rank:.2f}, "
        f"{place_of(OURS, mine)} of 7 (paper, recounted: "
        f"{standings(rex_paper.printed_grid())[OURS].mean_rank:.2f}, 1 of 7).",
        f"Of all twelve, {best} has the best mean rank, {all_of[best].mean_rank:.2f}; REX has "
        f"{all_of[OURS].mean_rank:.2f} ({place_of(OURS, all_of)} of 12), REX d=0.9 "
        f"{all_of['REX d=0.9'].mean_rank:.2f} ({place_of('REX d=0.9', all_of)} of 12).",
        f"Mean ranks that differ by less than {limit:.2f} cannot be told apart (Nemenyi, 5 %): so "
        f"REX is not told from {', '.join(alike) or 'none'}.",
    ]
    places = list(outcome.tested.values())
    for other in ("linear", "cosine"):
        d = duel([p.values[OURS] for p in places], [p.values[other] for p in places])
        lines.append(
            f"Against {other} REX wins {d.wins} and loses {d.losses} of {count} places; the "
            f"metric of {other} is {d.ratio - 1:+.1%} off REX's on average (95 %: {d.low - 1:+.1%} "
            f"to {d.high - 1:+.1%})."
        )
    return [*lines, *profiles_in_short(outcome)]


def profiles_in_short(outcome: Outcome) -> list[str]:
    """Returns the finding of Table 2, if it has any column."""
    ours = rex_tables.profile_columns(outcome)
    paper = list(rex_paper.printed_profiles().values())
    three = tuple(rex_paper.PROFILE_NAMES.values())
    if not ours:
        return []

    def won(sampling: str, name: str) -> str:
        counts = [rex_tables.profile_wins(side, sampling, three)[name] for side in (ours, paper)]
        return f"{counts[0]} of {len(ours)} columns (paper: {counts[1]} of {len(paper)})"

    return [
        f"Sampled at every iteration, REX beats step-like and linear in "
        f"{won(EVERY_ITERATION, OURS)}; sampled at 50-75, step-like wins in "
        f"{won('50-75', 'step-like')}."
    ]


def place_of(name: str, found: Mapping[str, Any]) -> int:
    return list(found).index(name) + 1


def chance(outcome: Outcome) -> str:
    """Says what of the mean ranks chance explains."""
    grid = outcome.grid()
    text = []
    for title, own in (("all twelve", grid), ("the paper's seven", seven(grid))):
        names = len(next(iter(own.values())))
        limit = critical_difference(names, len(own))
        text.append(
            f"Were {title} alike, ranks so unequal would come up with probability "
            f"{friedman_p(own):.1g} (Friedman); two mean ranks differ if they are {limit:.2f} "
            "apart (Nemenyi, 5 %)."
            if len(own) > 1
            else f"One place does not tell {title} apart."
        )
    paper = rex_paper.printed_grid()
    complete = {place: own for place, own in paper.items() if len(own) == len(rex_paper.SEVEN)}
    limit = critical_difference(len(rex_paper.SEVEN), len(complete))
    text.append(
        f"For the paper's {len(complete)} places with all seven schedules that is {limit:.2f}."
    )
    return " ".join(text)


def profile_parts(outcome: Outcome) -> list[str]:
    """Returns the sections of Table 2, empty where no place of it is finished."""
    found = {key: tested for key, tested in outcome.tested.items() if tested.profiles}
    if not found:
        return []
    parts = ["## Table 2, beside the paper's", TABLE_2]
    parts += ["Columns that a profile wins, of the paper's three; its own table has six columns:"]
    parts += [rex_tables.profile_wins_table(outcome)]
    best = Counter(rex_tables.best_cell(tested) for tested in found.values())
    words = [f"{profile} {sampling} ({n})" for (sampling, profile), n in best.most_common()]
    parts += [f"Best cell of a whole column (all six profiles): {', '.join(words)}."]
    for (name, budget), tested in found.items():
        setting, exponent = tested.place.setting, tested.place.profile_exponent
        place = f"{name}, {budget} % ({tested.place.jobs[0].steps:,} updates)"
        parts += [
            f"### {place}, learning rate {setting.lr(exponent):.2g}: {setting.metric_name}",
            rex_tables.profile_table(tested),
        ]
    parts += ["### The paper: test error in % of step-like / linear / REX, SGD"]
    return [*parts, rex_tables.printed_profile_table()]


def how_run(used: list[Row]) -> str:
    processor = sum(row["processor_seconds"] for row in used) / 60
    wall = sum(row["seconds"] for row in used) / 60
    busy = (
        " The machine was shared: a process had a core for itself "
        f"{processor / wall:.0%} of the time."
        if processor < 0.9 * wall
        else ""
    )
    return (
        f"Stacks of models, one process a core: {processor:.0f} minutes of one core in all, "
        f"{processor / 2:.0f} on two.{busy}"
    )


def speed_table(speed: list[dict[str, Any]]) -> str:
    """Returns updates per second of a core, and what the largest stack gains."""
    sizes = list(speed[0]["rates"])
    labels = ["plain loop" if size == "0" else f"stack of {size}" for size in sizes]
    lines = []
    for row in speed:
        rates = list(row["rates"].values())
        gain = f"{rates[-1] / rates[0]:.1f}x"
        lines.append([row["setting"], *(f"{rate:,}" for rate in rates), gain])
    return table(("setting", *labels, "gain"), lines)


def speed_choice(speed: list[dict[str, Any]]) -> str:
    """Says which way was taken, and why."""
    gains = []
    for row in speed:
        plain, *_, large = row["rates"].values()
        gains.append(large / plain)
    if min(gains) < 1.0:
        return "Neither way is ahead in all settings; stacks were taken, one process a core."
    return (
        f"A large stack does {min(gains):.1f} to {max(gains):.1f} times what single models do on "
        "the same core: so stacks, and one process a core to use all cores."
    )


def page_notes(outcome: Outcome) -> list[str]:
    """Returns what a reader must know about single places."""
    notes = []
    for (name, budget), tested in outcome.tested.items():
        if tested.place.at_edge:
            schedules = ", ".join(tested.place.at_edge)
            notes.append(f"{name}, {budget} %: best learning rate at the grid's edge: {schedules}")
        diverged = [s for s, values in tested.values.items() if math.inf in values]
        if diverged:
            notes.append(f"{name}, {budget} %: a test run diverged: {', '.join(diverged)}")
    return notes


def short_summary(outcome: Outcome) -> str:
    """Returns what the command line shows at the end of the runs."""
    if not outcome.tested:
        return "No place is finished."
    return "\n".join([rex_tables.twelve_table(outcome), bullets(in_short(outcome))])
