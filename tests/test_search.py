"""What a search measures, where it looks and what it chooses, against numbers by hand."""

import math

import pytest
import torch

from lrs_ext.autolrs import search
from lrs_ext.autolrs.presets import PeakSearch
from lrs_ext.autolrs.timetable import search_then_train

GRID = search.candidates((1e-4, 1e0), torch.device("cpu"))


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_candidates_span_the_bounds():
    assert GRID[0].item() == -4.0
    assert GRID[-1].item() == 0.0
    assert GRID.diff().std() < 1e-12


def test_the_first_trials_are_spread_over_the_bounds():
    assert search.spread((1e-4, 1.0), 5) == pytest.approx([-4.0, -3.0, -2.0, -1.0, 0.0])
    assert search.spread((1e-4, 1.0), 1) == pytest.approx([-2.0])


@pytest.mark.parametrize(
    ("positions", "objectives", "wanted"),
    [
        ((-4.0, -2.0, 0.0), (3.0, 1.0, 2.0), -1.0),  # towards the better neighbour
        ((-4.0, -2.0, 0.0), (2.0, 1.0, 3.0), -3.0),
        ((0.0, -2.0, -4.0), (2.0, 1.0, 3.0), -1.0),  # whatever the order
        ((-4.0, -2.0, 0.0), (2.0, 1.0, 2.0), -1.0),
        ((-4.0, -2.0, 0.0), (1.0, 2.0, 3.0), -3.0),  # at an end there is one only
        ((-4.0, -2.0, 0.0), (3.0, 2.0, 1.0), -1.0),
        ((-4.0, 0.0), (1.0, 1.0), -2.0),
    ],
)
def test_the_other_trials_go_downhill(positions, objectives, wanted):
    found = search.next_downhill(values(*positions), values(*objectives))
    assert found.item() == pytest.approx(wanted)


def test_the_tail_is_the_last_losses():
    assert search.tail_mean(values(9.0, 9.0, 2.0, 4.0), 50).item() == 3.0
    assert search.tail_mean(values(9.0, 5.0, 4.0), 50).item() == 4.0
    assert search.tail_mean(values(9.0, 9.0, 9.0, 9.0, 2.0, 4.0, 6.0), 43).item() == 4.0
    assert search.tail_mean(values(7.0), 30).item() == 7.0
    assert search.tail_mean(values(math.nan, 1.0, 1.0, 1.0), 30).item() == math.inf


def test_what_is_worse_than_no_progress_is_equally_bad():
    capped = search.capped(values(1.0, 3.0, 50.0, math.inf, math.nan), values(2.0)[0])
    assert capped.tolist() == pytest.approx([1.0, 2.1, 2.1, 2.1, 2.1])
    capped = search.capped(values(math.inf, math.nan), values(math.nan)[0])
    assert capped.isfinite().all()
    assert capped[0] == capped[1]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_losses_does_not_count(scale):
    objectives, start = values(1.0, 1.9, 50.0, math.inf), values(2.0)[0]
    for each in (objectives, objectives.clamp(min=2.0)):
        wanted = search.capped(each, start)
        assert torch.allclose(search.capped(scale * each, scale * start) / scale, wanted, atol=0.0)


@pytest.mark.parametrize("lost", [0.05, 0.1, 0.3])
def test_the_peak_is_the_mirror_image_of_the_end_of_the_valley(monkeypatch, lost):
    monkeypatch.setattr(search, "NEARLY", lost)
    positions = torch.linspace(-4.0, 0.0, 41, dtype=torch.float64)
    valley = (positions + 1.5).square()  # 1 a decade away
    found = search.peak_between(positions, valley, values(1.0)[0], GRID, gap=1.0)
    assert found.item() == pytest.approx(-1.5 - math.sqrt(lost) - search.MARGIN_DECADES, abs=0.04)


def test_a_cliff_above_the_best_leaves_little_to_go_down():
    positions = torch.linspace(-4.0, 0.0, 41, dtype=torch.float64)
    cliff = torch.where(positions > -1.0, 2.0, -positions)
    found = search.peak_between(positions, cliff, values(2.0)[0], GRID, gap=1.0).item()
    assert -1.5 < found < -1.0 - search.MARGIN_DECADES


@pytest.mark.parametrize("gap", [0.4, 1.0])
def test_the_end_of_a_valley_that_was_not_tried_is_half_a_gap_away(gap):
    positions = values(-4.0, -3.0, -2.0)
    found = search.peak_between(positions, -positions, values(5.0)[0], GRID, gap=gap).item()
    assert found == pytest.approx(-2.0 - gap / 2 - search.MARGIN_DECADES, abs=0.01)


def test_the_lowest_rate_will_do_if_it_does_as_well_as_any():
    positions, flat = values(-4.0, -3.0, -2.0), values(1.0, 1.0, 1.0)
    assert search.peak_between(positions, flat, values(1.0)[0], GRID, gap=1.0).item() == -4.0


def test_one_lucky_trial_between_close_neighbours_is_smoothed():
    positions = torch.linspace(-2.0, 0.0, 9, dtype=torch.float64)
    valley = (positions + 1.5).square()
    lucky = valley.clone()
    lucky[6] = valley[2] - 0.2  # a decade above the bottom, better than it
    found = search.peak_between(positions, lucky, values(3.0)[0], GRID, gap=0.25).item()
    assert found < -1.5


def test_the_peak_stays_within_the_bounds():
    positions = values(-4.0, -3.0, -2.0)
    found = search.peak_between(positions, positions, values(0.0)[0], GRID, gap=1.0)
    assert found.item() == -4.0


def test_what_recovers_beyond_a_ridge_counts_as_no_progress():
    positions, objectives = values(-1.0, -2.0, -3.0, -1.5), values(0.1, 0.3, 0.9, 0.7)
    found = search.first_valley(positions, objectives, values(1.0)[0])
    assert found.tolist() == [1.0, 0.3, 0.9, 1.0]
    gentle = values(0.1, 0.3, 0.9, 0.5)
    assert search.first_valley(positions, gentle, values(1.0)[0]).equal(gentle)


def test_the_best_tried_is_not_the_luckiest():
    positions, objectives = values(-3.0, -2.0, -1.9, 0.0), values(2.0, 1.0, 0.9, 3.0)
    noise = values(0.01, 0.01, 2.0, 0.01)
    assert search.best_tried(positions, objectives, noise).item() == -2.0


def test_the_next_by_a_bound_goes_where_little_is_known():
    position = search.next_by_bound(values(-4.0, -3.8), values(1.0, 1.0), values(0.1, 0.1), GRID)
    assert position.item() > -2.5


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e9, 1e20])
@pytest.mark.parametrize("count", [1, 3])
def test_the_next_by_a_bound_does_not_depend_on_the_unit_of_equal_losses(count, scale):
    """Far from what was tried; the mean of losses that are all equal tells nothing."""
    positions, objectives = values(-3.5, -3.0, -2.5)[:count], values(5.0, 5.0, 5.0)[:count]
    noise = values(1.0, 1.0, 1.0)[:count]
    at = search.next_by_bound(positions, scale * objectives, scale * noise, GRID)
    assert at == GRID[-1]


def test_rates_are_powers_of_ten():
    assert search.rate_at(values(-3.0)[0]).item() == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "hardness", [(1, 1, 1, 1, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1, 2, 2)]
)
def test_hard_batches_at_the_end_do_not_make_all_trials_equally_bad(hardness):
    """Trials lose a share of the loss in each update, by far the most at a rate of 0.01."""
    timetable = search_then_train(1000, 0.1, 8, 10)
    found = PeakSearch(timetable, (1e-4, 1.0), torch.device("cpu"), 0, lambda value: value)
    for trial in range(8):
        found.propose(0, trial)
        share = 0.01 * torch.exp(-((found.positions[0, trial] + 2.0) ** 2))
        progress = (1.0 - share) ** torch.arange(10, dtype=torch.float64)
        found.record(0, trial, values(*hardness) * progress, 1000.0)
    assert -3.5 < found.choose(0).log10().item() < -2.0
