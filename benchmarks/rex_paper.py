"""What the REX paper prints: Tables 1, 2 and 4 to 11 of arXiv 2107.04197 v1, from rex_paper.csv."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path

PAPER = Path(__file__).resolve().parent / "rex_paper.csv"
HIGHER_IS_BETTER = frozenset({"mAP", "glue_score", "glue_task_score"})
# Table 10 is the mean of Table 11, Tables 1 and 2 are made of other runs or of these.
RANKED_TABLES = frozenset({"4", "5", "6", "7", "8", "9", "11"})
LOW_BUDGETS = frozenset({"1%", "5%", "10%"})
# Our names of the paper's seven schedules; it counts plateau as step, the better of the two.
NAMES = {
    "none": "none",
    "step": "step",
    "plateau": "plateau",
    "linear": "linear",
    "cosine": "cosine",
    "exp": "exponential",
    "onecycle": "OneCycle",
    "rex": "REX",
}
SEVEN = ("REX", "linear", "cosine", "OneCycle", "step", "exponential", "none")
PROFILE_NAMES = {"step": "step-like", "linear": "linear", "rex": "REX"}
SAMPLING_NAMES = {
    "50-75": "50-75",
    "33-66": "33-66",
    "25-50-75": "25-50-75",
    "10-10": "every 10 %",
    "5-25": "every 5 %",
    "1-100": "every 1 %",
    "every_iteration": "every iteration",
}

Row = dict[str, str]
Grid = dict[tuple[str, ...], dict[str, float]]


@functools.cache
def rows() -> tuple[Row, ...]:
    with PAPER.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def printed_shares() -> dict[tuple[str, str], tuple[float, float]]:
    """Returns Table 1: percent best and among the best three, by schedule and "low", "high" or
    "overall" budgets.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows():
        if row["table"] == "1":
            key = NAMES[row["schedule"]], row["budget_percent_or_epochs"]
            found.setdefault(key, {})[row["metric"]] = float(row["value"])
    return {key: (own["top1_percent"], own["top3_percent"]) for key, own in found.items()}


def printed_grid() -> Grid:
    """Returns the results of all settings and budgets, lower is better, plateau within step."""
    grid: Grid = {}
    for row in rows():
        if row["table"] not in RANKED_TABLES:
            continue
        sign = -1.0 if row["metric"] in HIGHER_IS_BETTER else 1.0
        place = row["setting"], row["optimizer"], row["budget_percent_or_epochs"]
        grid.setdefault(place, {})[NAMES[row["schedule"]]] = sign * float(row["value"])
    return {place: merge_plateau(values) for place, values in grid.items()}


def merge_plateau(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the values with the better of step and plateau as "step".

    >>> merge_plateau({"step": 2.0, "REX": 1.0, "plateau": 1.5})
    {'step': 1.5, 'REX': 1.0}
    """
    merged = dict(values)
    plateau = merged.pop("plateau", None)
    if plateau is not None:
        merged["step"] = min(merged["step"], plateau)
    return merged


def printed_profiles() -> dict[tuple[str, str], dict[tuple[str, str], float]]:
    """Returns Table 2: test error by (model, epochs), then by (sampling rate, profile)."""
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for row in rows():
        if row["table"] == "2":
            column = row["setting"], row["budget_percent_or_epochs"]
            key = SAMPLING_NAMES[row["sampling"]], PROFILE_NAMES[row["schedule"]]
            found.setdefault(column, {})[key] = float(row["value"])
    return found
