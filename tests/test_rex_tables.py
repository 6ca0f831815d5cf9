"""The tables of the reproduction of the REX paper: ranks by hand, and the paper's own numbers."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import rex_outcome
import rex_page
import rex_paper
import rex_ranks
import rex_runs
import rex_tables
from rex_settings import SCHEDULES, SETTINGS
from test_bench_rex import TINY

import lrs_ext

# Ranks

GRID = {
    ("a", 1): {"x": 1.0, "y": 2.0, "z": 3.0, "w": 4.0},
    ("a", 2): {"x": 2.0, "y": 1.0, "z": 2.0, "w": 9.0},
}


def test_ranks_by_hand():
    assert rex_ranks.ranks(GRID["a", 2]) == {"x": 2, "y": 1, "z": 2, "w": 4}
    found = rex_ranks.standings(GRID)
    assert list(found) == ["x", "y", "z", "w"]
    assert [s.mean_rank for s in found.values()] == [1.5, 1.5, 2.5, 4.0]
    assert [s.first for s in found.values()] == [50, 50, 0, 0]
    assert [s.top_three for s in found.values()] == [100, 100, 100, 0]
    assert (found["w"].low, found["w"].high) == (4.0, 4.0)
    assert (found["x"].low, found["x"].high) == (1.0, 2.0)


def test_a_schedule_that_misses_places_is_ranked_where_it_is():
    found = rex_ranks.standings({1: {"x": 1.0, "y": 2.0}, 2: {"x": 1.0}})
    assert (found["x"].places, found["y"].places, found["y"].mean_rank) == (2, 1, 2.0)


def test_diverged_is_worst():
    assert rex_ranks.ranks({"x": math.inf, "y": 5.0}) == {"x": 2, "y": 1}
    d = rex_ranks.duel([[1.0, 1.0], [1.0, 1.0]], [[math.inf, 2.0], [2.0, 2.0]])
    assert (d.wins, d.clear_wins, d.ratio) == (2, 2, pytest.approx(2.0))


def test_critical_differences_of_demsars_table():
    for schedules, q in ((2, 1.960), (5, 2.728), (7, 2.949), (10, 3.164)):
        expected = q * math.sqrt(schedules * (schedules + 1) / (6 * 30))
        assert rex_ranks.critical_difference(schedules, 30) == pytest.approx(expected, rel=1e-3)


def test_friedman_of_equal_and_of_unequal_schedules():
    order = list(itertools.permutations((1.0, 2.0, 3.0)))
    alike = {i: dict(zip("xyz", values, strict=True)) for i, values in enumerate(order)}
    assert rex_ranks.friedman_p(alike) == pytest.approx(1.0)
    unequal = {i: {"x": 1.0, "y": 2.0, "z": math.inf} for i in range(6)}
    assert rex_ranks.friedman_p(unequal) == pytest.approx(math.exp(-6.0))  # chi2 = 12, 2 degrees


def test_not_first_names_the_winner(monkeypatch):
    values = {name: [3.0, 3.0] for name in SCHEDULES}
    values |= {"REX": [2.0, 2.0], "WSD": [1.0, 2.5]}
    key = ("VAE, SGD", 5)
    place = rex_runs.Place(SETTINGS[key[0]], 5, [], {})
    tested = {key: rex_outcome.Tested(place, values, {})}
    outcome = rex_outcome.Outcome(TINY, [], tested, [])
    (line,) = rex_tables.not_first(outcome)
    assert line == "VAE, SGD, 5 %: WSD 1.750, REX 2.000 (rank 2); not in all seeds"


# The paper's numbers


def test_the_papers_tables_add_up():
    counts = {}
    for row in rex_paper.rows():
        counts[row["table"]] = counts.get(row["table"], 0) + 1
    assert counts == {
        **{"1": 42, "2": 126, "4": 90, "5": 90, "6": 90, "7": 90},
        **{"8": 24, "9": 42, "10": 21, "11": 168},
    }
    tasks, means = {}, {}
    for row in rex_paper.rows():
        key = row["schedule"], row["budget_percent_or_epochs"]
        if row["table"] == "11":
            tasks.setdefault(key, []).append(float(row["value"]))
        elif row["table"] == "10":
            means[key] = float(row["value"])
    for key, value in means.items():
        assert value == pytest.approx(sum(tasks[key]) / 8, abs=0.08)  # printed with one decimal


def test_the_recount_of_the_papers_table_1():
    found = rex_ranks.standings(rex_paper.printed_grid())
    rounded = {
        name: (round(s.first), round(s.top_three), round(s.mean_rank, 2), s.places)
        for name, s in found.items()
    }
    assert rounded == {
        "REX": (70, 91, 1.62, 82),
        "linear": (11, 70, 2.95, 82),
        "cosine": (9, 66, 3.16, 82),
        "OneCycle": (13, 44, 3.95, 82),
        "step": (5, 24, 4.37, 82),
        "exponential": (5, 12, 4.89, 82),
        "none": (2, 7, 6.30, 54),
    }
    printed = rex_paper.printed_shares()
    assert printed["REX", "low"] == (73, 95)
    assert printed["none", "overall"] == (1, 5)
    assert len(printed) == 21


def test_the_papers_table_2_by_profile():
    columns = list(rex_paper.printed_profiles().values())
    assert len(columns) == 6
    names = tuple(rex_paper.PROFILE_NAMES.values())
    won = {rate: rex_tables.profile_wins(columns, rate, names) for rate in lrs_ext.SAMPLING}
    assert won["50-75"]["step-like"] == won["33-66"]["step-like"] == 6
    assert won["every 1 %"]["REX"] == 4
    assert won["every iteration"]["REX"] == 5


def test_the_readme_says_what_was_measured():
    root = Path(__file__).parents[1]
    document = json.loads((root / "benchmarks" / "results" / "rex.json").read_text())
    seven, twelve = document["summary"]["seven"], document["summary"]["twelve"]
    text = " ".join((root / "README.md").read_text().split())
    rex, places = seven["REX"], seven["REX"]["places"]
    assert (
        f"REX is the best in {rex['first']:.0f} % of {places} places (setting and budget) and "
        f"among the best three in {rex['top_three']:.0f} %" in text
    )
    ranked = ", ".join(f"{name} {twelve[name]['mean_rank']:.1f}" for name in list(twelve)[:6])
    assert f"mean ranks: {ranked}" in text


def test_the_page_is_that_of_the_numbers():
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    results = rex_runs.read_results([folder / "rex.json"])
    document = json.loads((folder / "rex.json").read_text())
    outcome = rex_outcome.gather(rex_runs.FULL, results)
    assert [list(key) for key in outcome.missing] == document["missing"]
    found = rex_ranks.standings(outcome.grid())
    for name, own in document["summary"]["twelve"].items():
        assert rex_page.rounded(found[name]) == own
    page = (folder / "rex.md").read_text()
    for line in rex_page.in_short(outcome):
        assert line in page
    for lines in (rex_tables.shares_table(outcome), rex_tables.rank_table(outcome)):
        assert lines in page
