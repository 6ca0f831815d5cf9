"""The tables of the REX page: ours beside the paper's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import rex_paper
from results_page import table
from rex_outcome import HIGH, LOW, Outcome, Tested, deviation, mean, seven
from rex_paper import LOW_BUDGETS, SEVEN
from rex_ranks import Standing, duel, ranks, standings
from rex_runs import Scale
from rex_settings import PROFILES, SCHEDULES, SETTINGS

import lrs_ext

OURS = "REX"
HALVES = {"low": LOW, "high": HIGH, "overall": LOW + HIGH}


def shares_table(outcome: Outcome) -> str:
    """Returns Table 1: percent of places where a schedule is first / among the first three."""
    printed = rex_paper.printed_shares()
    ours = {
        half: standings(seven(outcome.grid(budgets=budgets))) for half, budgets in HALVES.items()
    }
    recount = standings(rex_paper.printed_grid())
    by_seed = [standings(seven(outcome.grid(seed))) for seed in range(len(outcome.scale.seeds))]
    header = ["schedule"]
    for half in HALVES:
        header += [f"{half}, ours", f"{half}, paper"]
    header += ["overall by seed, ours", "overall, recounted from the paper's tables"]
    lines = []
    for name in SEVEN:
        cells = [name]
        for half, own in ours.items():
            cells += [share(own.get(name)), "{:.0f} / {:.0f}".format(*printed[name, half])]
        seeds = [standing[name] for standing in by_seed if name in standing]
        cells += [spread([s.first for s in seeds]) + " / " + spread([s.top_three for s in seeds])]
        lines.append([*cells, share(recount[name])])
    return table(header, lines)


def share(standing: Standing | None) -> str:
    return "-" if standing is None else f"{standing.first:.0f} / {standing.top_three:.0f}"


def spread(values: Sequence[float]) -> str:
    """Returns the least and the largest, as whole numbers."""
    return f"{min(values):.0f} to {max(values):.0f}" if values else "-"


def rank_table(outcome: Outcome) -> str:
    """Returns the mean ranks of the paper's seven schedules, ours and the paper's."""
    own, paper = standings(seven(outcome.grid())), standings(rex_paper.printed_grid())
    halves = {
        half: standings(seven(outcome.grid(budgets=HALVES[half]))) for half in ("low", "high")
    }
    paper_halves = {
        half: standings(
            {k: v for k, v in rex_paper.printed_grid().items() if is_low(k) == (half == "low")}
        )
        for half in ("low", "high")
    }
    header = ("schedule", "low, ours", "low, paper", "high, ours", "high, paper")
    header += ("overall, ours", "95 %", "overall, paper", "95 %")
    lines = []
    for name in SEVEN:
        cells = [name]
        for half in ("low", "high"):
            cells += [rank(halves[half].get(name)), rank(paper_halves[half].get(name))]
        for standing in (own.get(name), paper.get(name)):
            cells += [rank(standing), bounds(standing)]
        lines.append(cells)
    return table(header, lines)


def is_low(place: Sequence[str]) -> bool:
    """Whether a place of the paper has a low budget; one epoch of GLUE, a third, is none."""
    return place[-1] in LOW_BUDGETS


def rank(standing: Standing | None) -> str:
    return "-" if standing is None else f"{standing.mean_rank:.2f}"


def bounds(standing: Standing | None) -> str:
    return "-" if standing is None else f"{standing.low:.2f} to {standing.high:.2f}"


def twelve_table(outcome: Outcome) -> str:
    """Returns the standing of all schedules, plateau on its own."""
    halves = {half: standings(outcome.grid(budgets=budgets)) for half, budgets in HALVES.items()}
    header = ("schedule", "first", "top three", "mean rank", "95 %", "low budgets", "high budgets")
    lines = []
    for name, own in halves["overall"].items():
        cells = [name, f"{own.first:.0f} %", f"{own.top_three:.0f} %", rank(own), bounds(own)]
        lines.append([*cells, *(rank(halves[half].get(name)) for half in ("low", "high"))])
    return table(header, lines)


def duel_table(outcome: Outcome, name: str = OURS) -> str:
    """Returns one schedule against each of the others."""
    header = ("against", "wins", "losses", "ties", "in all seeds: wins", "losses")
    header += (f"its metric / {name}'s", "95 %")
    lines = []
    places = outcome.tested.values()
    for other in SCHEDULES:
        if other != name:
            d = duel([p.values[name] for p in places], [p.values[other] for p in places])
            counts = (d.wins, d.losses, d.ties, d.clear_wins, d.clear_losses)
            interval = f"{d.low:.3f} to {d.high:.3f}"
            lines.append([other, *map(str, counts), f"{d.ratio:.3f}", interval])
    return table(header, lines)


def not_first(outcome: Outcome) -> list[str]:
    """Says of each place where REX does not have the best mean, which schedule has, by how much."""
    lines = []
    for key, values in outcome.grid().items():
        best = min(values, key=values.__getitem__)
        if ranks(values)[OURS] == 1:
            continue
        seeds = outcome.tested[key].values
        agree = all(a < b for a, b in zip(seeds[best], seeds[OURS], strict=True))
        lines.append(
            f"{key[0]}, {key[1]} %: {best} {number(values[best])}, REX {number(values[OURS])} "
            f"(rank {ranks(values)[OURS]}); {'in all seeds' if agree else 'not in all seeds'}"
        )
    return lines


def settings_table(scale: Scale) -> str:
    """Returns what was trained, for how long at most and at least."""
    header = ("setting", "model and data", "parameters", "batch", "updates at 100 %")
    header += (f"at {min(scale.budgets)} %", "measured")
    lines = []
    for name, setting in SETTINGS.items():
        parameters = sum(p.numel() for p in setting.task.model(0).parameters())
        batch = next(iter(setting.task.batches(0)))
        steps = [setting.steps(percent, scale.fraction) for percent in (100, min(scale.budgets))]
        counts = (parameters, len(next(iter(batch.values()))), *steps)
        cells = [name, setting.task.title, *(f"{count:,}" for count in counts)]
        lines.append([*cells, setting.metric_name])
    return table(header, lines)


def setting_table(outcome: Outcome, setting: str) -> str:
    """Returns test metric and tuned learning rate by schedule and budget."""
    found = {budget: t for (name, budget), t in outcome.tested.items() if name == setting}
    header = ["schedule"]
    header += [f"{budget} %, {t.place.jobs[0].steps:,} updates" for budget, t in found.items()]
    lines = []
    for schedule in SCHEDULES:
        cells = [schedule]
        for tested in found.values():
            best = min(mean(values) for values in tested.values.values())
            cell = with_spread(tested.values[schedule], best)
            lr = tested.place.setting.lr(tested.place.chosen[schedule].exponent)
            cells.append(f"{cell}, {lr:.2g}")
        lines.append(cells)
    return table(header, lines)


def with_spread(values: Sequence[float], best: float) -> str:
    """Returns mean and standard deviation over seeds; the best mean is bold."""
    text = number(mean(values))
    off = deviation(values)
    decimals = len(text.partition(".")[2])
    text += "" if math.isnan(off) else f" +- {off:.{decimals}f}"
    return f"**{text}**" if mean(values) == best else text


def number(value: float) -> str:
    """Returns a number with three decimals, two from 10 on.

    >>> number(12.345), number(0.5), number(float("inf"))
    ('12.35', '0.500', 'diverged')
    """
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


# Table 2


def profile_table(tested: Tested) -> str:
    """Returns the test metric by sampling rate and profile at one learning rate."""
    lines = []
    for sampling in lrs_ext.SAMPLING:
        row = {profile: tested.profiles[sampling, profile] for profile in PROFILES}
        best = min(map(mean, row.values()))
        lines.append([sampling, *(with_spread(values, best) for values in row.values())])
    return table(("sampling", *PROFILES), lines)


def printed_profile_table() -> str:
    """Returns the paper's Table 2: step-like / linear / REX by sampling rate and column."""
    printed = rex_paper.printed_profiles()
    lines = []
    for sampling in lrs_ext.SAMPLING:
        cells = [sampling]
        for column in printed.values():
            row = {name: column[sampling, name] for name in rex_paper.PROFILE_NAMES.values()}
            best = min(row.values())
            shown = (f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in row.values())
            cells.append(" / ".join(shown))
        lines.append(cells)
    return table(("sampling", *(f"{model}, {epochs}" for model, epochs in printed)), lines)


def profile_wins_table(outcome: Outcome) -> str:
    """Returns how many columns each of the paper's three profiles wins at each rate."""
    three = tuple(rex_paper.PROFILE_NAMES.values())
    sides = {"ours": profile_columns(outcome), "paper": list(rex_paper.printed_profiles().values())}
    header = ["sampling"]
    header += [f"{name}, {side}" for name in three for side in sides]
    lines = []
    for sampling in lrs_ext.SAMPLING:
        cells = [sampling]
        for name in three:
            for columns in sides.values():
                won = profile_wins(columns, sampling, three)[name]
                cells.append(f"{won} of {len(columns)}")
        lines.append(cells)
    return table(header, lines)


def profile_columns(outcome: Outcome) -> list[dict[tuple[str, str], float]]:
    """Returns Table 2: mean metrics by (sampling rate, profile), a column a place."""
    return [
        {key: mean(values) for key, values in tested.profiles.items()}
        for tested in outcome.tested.values()
        if tested.profiles
    ]


def profile_wins(
    columns: Iterable[Mapping[tuple[str, str], float]], sampling: str, names: Sequence[str]
) -> Counter[str]:
    """Counts the columns in which a profile has the lowest value at a rate; ties count for each."""
    won: Counter[str] = Counter()
    for column in columns:
        row = {name: column[sampling, name] for name in names}
        won.update(name for name, value in row.items() if value == min(row.values()))
    return won


def best_cell(tested: Tested) -> tuple[str, str]:
    """Returns the sampling rate and profile with the lowest mean of a place."""
    return min(tested.profiles, key=lambda key: mean(tested.profiles[key]))
