"""What a search measures, where it looks and what it chooses, against numbers by hand."""

import math

import pytest
import torch

from lrs_ext.autolrs import search

GRID = search.candidates((1e-4, 1e0), torch.device("cpu"))


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_candidates_span_the_bounds():
    assert GRID[0].item() == -4.0
    assert GRID[-1].item() == 0.0
    assert GRID.diff().std() < 1e-12


def test_coarse_trials_are_spread_over_the_bounds():
    assert search.spread((1e-4, 1.0), 5) == pytest.approx([-4.0, -3.0, -2.0, -1.0, 0.0])
    assert search.spread((1e-4, 1.0), 1) == pytest.approx([-2.0])


@pytest.mark.parametrize(
    ("positions", "objectives", "wanted"),
    [
        ((-2.0,), (1.0,), -2.5),  # lower rates first
        ((-2.0, -2.5), (1.0, 0.9), -3.0),
        ((-2.0, -2.5), (0.9, 1.0), -1.5),
        ((-2.0, -2.5, -1.5), (0.9, 1.0, 1.2), -2.25),  # in between: towards the better one
        ((-2.0, -2.5, -1.5), (0.9, 1.2, 1.0), -1.75),
        ((-3.8,), (1.0,), -3.3),  # at the end of the bounds: the other way
        ((-3.8, -3.3), (0.9, 1.0), -3.55),
        ((-0.2, -0.7), (0.9, 1.0), -0.45),
    ],
)
def test_fine_trials_go_downhill(positions, objectives, wanted):
    found = search.next_downhill(values(*positions), values(*objectives), GRID)
    assert found.item() == pytest.approx(wanted)


def test_fine_trials_stay_within_narrow_bounds():
    grid = search.candidates((0.1, 0.2), torch.device("cpu"))
    found = search.next_downhill(grid[100:101], values(1.0), grid).item()
    assert math.log10(0.1) <= found <= math.log10(0.2)
    assert found != grid[100].item()


def test_the_objective_is_the_mean_of_the_last_half():
    assert search.tail_mean(values(9.0, 9.0, 2.0, 4.0)).item() == 3.0
    assert search.tail_mean(values(9.0, 5.0, 4.0)).item() == 4.0
    assert search.tail_mean(values(7.0)).item() == 7.0
    assert search.tail_mean(values(math.nan, 1.0, 1.0, 1.0)).item() == math.inf


def test_what_is_worse_than_no_progress_is_equally_bad():
    capped = search.capped(values(1.0, 3.0, 50.0, math.inf, math.nan), values(2.0)[0])
    assert capped.tolist() == pytest.approx([1.0, 2.1, 2.1, 2.1, 2.1])
    capped = search.capped(values(math.inf, math.nan), values(math.nan)[0])
    assert capped.isfinite().all()
    assert capped[0] == capped[1]


def test_the_choice_is_the_bottom_of_a_valley():
    positions = values(-3.0, -2.0, -1.0)
    best = search.best_between(positions, (positions + 1.9).square(), GRID)
    assert best.item() == pytest.approx(-1.9, abs=0.15)


def test_the_choice_stays_within_what_was_tried():
    positions = values(-3.0, -2.5, -2.0)
    assert search.best_between(positions, -positions, GRID).item() <= -2.0


def test_the_peak_falls_with_the_horizon():
    position = values(-2.0)[0]
    assert search.for_horizon(position, 10, 80).item() == pytest.approx(-2.12)
    assert search.for_horizon(position, 10, 10).item() == -2.0


def test_the_best_tried_is_not_the_luckiest():
    positions, objectives = values(-3.0, -2.0, -1.9, 0.0), values(2.0, 1.0, 0.9, 3.0)
    noise = values(0.01, 0.01, 2.0, 0.01)
    assert search.best_tried(positions, objectives, noise).item() == -2.0


def test_the_next_by_a_bound_goes_where_little_is_known():
    position = search.next_by_bound(values(-4.0, -3.8), values(1.0, 1.0), values(0.1, 0.1), GRID)
    assert position.item() > -2.5


def test_rates_are_powers_of_ten():
    assert search.rate_at(values(-3.0)[0]).item() == pytest.approx(1e-3)
