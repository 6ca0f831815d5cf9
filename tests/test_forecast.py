"""Forecasts: against brute force, scipy's fits and the method of AutoLRS, and at their edges."""

import contextlib
import json
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_no_sync import NoReadingMethods, NoReadingOps
from torch._subclasses import FakeTensorMode

from lrs_ext.autolrs import forecast as forecast_of_package
from lrs_ext.autolrs.forecast import FASTEST, MIN_POINTS, SLOWEST, _posterior, _predict, forecast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

NAN, INF = float("nan"), float("inf")
# Sums in another order, then divided by a noise that may be a share of 1e-4 of the losses.
ORDER = cases.Tolerance(rtol=1e-8, atol=1e-10)
# Without noise the rate is found to a step of the last grid, a factor of 1 + 4e-3 at most, and the
# curve, as a share of a, to less than that.
GRID = cases.Tolerance(rtol=0.0, atol=1e-3)


def double(values):
    return torch.tensor(np.array(values), dtype=torch.float64)


def predict(losses, horizon):
    return tuple(v.numpy() for v in forecast(double(losses), horizon))


def agree(actual, expected, tolerance=ORDER):
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, tolerance.rtol, tolerance.atol)


def curve(t, a, b, c):
    return a * np.exp(-b * np.asarray(t)) + c


def noisy(n=100, a=2.0, b=0.03, c=1.0, std=0.05, seed=0):
    noise = np.random.default_rng(seed).standard_normal(n)
    return curve(np.arange(n), a, b, c) + std * noise


def brute_force(losses, horizon, rates):
    """Mean and std on a grid over a, c and the noise, for uniform log b, a, c, log noise.

    A rise counts by its end: L(n-1) where a < 0. No |a| is more than twice the largest loss.
    """
    n, most, masses, values = len(losses), 2.0 * losses.max(), [], []
    steps = np.linspace(-1.0, 1.0, 121)
    for rate in rates:
        u = np.exp(-rate * np.arange(n))
        (a0, c0), (residual,), *_ = np.linalg.lstsq(np.stack([u, np.ones(n)], 1), losses)
        sigma = np.sqrt(residual / n)
        # A grid over a and, because c goes with a, over how far c is from what suits that a.
        ends = a0 + 7.0 * sigma / np.sqrt(n * u.var()) * np.array([-1.0, 1.0])
        low, high = np.clip(ends, -most, most)
        a = (low + high + (high - low) * steps)[:, None] / 2.0
        c = c0 - (a - a0) * u.mean() + 7.0 * sigma / np.sqrt(n) * steps[None, :]
        at_zero, end, later = (a * factor + c for factor in (0.0, u[-1], np.exp(-rate * horizon)))
        squares = ((a[..., None] * u + c[..., None] - losses) ** 2).sum(-1)
        noise = sigma * np.exp(np.linspace(-0.8, 0.8, 17))[:, None, None]
        mass = np.exp(-n * np.log(noise) - squares / (2.0 * noise**2)).sum(0)
        masses.append(np.where(at_zero >= 0.0, mass * (high - low) * sigma, 0.0))
        values.append(np.where(a < 0.0, end, later))
    masses, values = np.stack(masses), np.stack(values)
    masses = masses / masses.sum()
    mean = (masses * values).sum()
    return mean, np.sqrt((masses * (values - mean) ** 2).sum())


SERIES = {
    "identified": {"std": 0.02},
    "slow": {"b": 0.003, "std": 0.05},
    "noisy": {"b": 0.01, "std": 0.3},
    "no floor": {"c": 0.0, "b": 0.04, "std": 0.05},
    "flat": {"a": 0.0, "std": 0.1},
    "rising": {"a": -1.0, "b": 0.005, "c": 3.0, "std": 0.1},
    "fast": {"b": 0.7, "std": 0.1},
}


@pytest.mark.parametrize("name", SERIES)
def test_the_posterior_is_that_of_brute_force(name):
    losses = noisy(60, **SERIES[name])
    rates = np.geomspace(SLOWEST / 59, FASTEST, 24)
    scale = np.abs(losses).max()
    arguments = double(np.arange(60)), double(losses / scale), double(np.ones(60))
    posterior = _posterior(*arguments, double(np.log(rates)), hold_rise=True)
    for horizon in (59.0, 600.0):
        mean, std = (scale * v.item() for v in _predict(posterior, double([horizon])))
        expected_mean, expected_std = brute_force(losses, horizon, rates)
        # Ten gains a rate (c >= 0 cuts between them), and near c = 0 a normal distribution instead
        # of Student's with 59 degrees of freedom.
        assert abs(mean - expected_mean) < 0.1 * expected_std
        assert abs(std - expected_std) < 0.1 * expected_std


@pytest.mark.parametrize("b", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_where_the_rate_is_known_it_is_least_squares(b, seed):
    optimize = pytest.importorskip("scipy.optimize")
    losses, t = noisy(200, b=b, seed=seed), np.arange(200)
    grid = np.geomspace(b / 3, 3 * b, 2000)
    fits = [optimize.nnls(np.stack([np.exp(-r * t), np.ones(200)], 1), losses) for r in grid]
    rate, ((a, c), _) = min(zip(grid, fits, strict=True), key=lambda fit: fit[1][1])
    (a, rate, c), covariance = optimize.curve_fit(
        curve, t, losses, p0=(a, rate, c), bounds=(0.0, INF)
    )
    for horizon in (50.0, 199.0, 1000.0):
        gradient = np.array([np.exp(-rate * horizon), -a * horizon * np.exp(-rate * horizon), 1.0])
        expected = np.sqrt(gradient @ covariance @ gradient)
        mean, std = predict(losses, horizon)
        # Tukey's weights change an estimate by about a fifth of its std (efficiency 97 %), and
        # the std, which they estimate from fewer residuals, by as much at most.
        assert abs(mean - curve(horizon, a, rate, c)) < 0.4 * expected
        assert abs(std / expected - 1.0) < 0.25


@pytest.mark.parametrize("n", [10, 100, 800])
@pytest.mark.parametrize("b_n", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("c", [0.0, 1.0, 50.0])
def test_without_noise_the_curve_is_found(n, b_n, c):
    truth = {"a": 2.0, "b": b_n / n, "c": c}
    losses = curve(np.arange(n), **truth)
    for horizon in (n - 1.0, 3.0 * n, 10.0 * n):
        mean, std = predict(losses, horizon)
        agree([mean / 2], [curve(horizon, **truth) / 2], GRID)
        assert std < 2e-3


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.7, 3e8])
@pytest.mark.parametrize("n", [4, 5, 100])
def test_flat_losses_stay(value, n):
    # The noise that is always taken to be there is a share of 1e-13.
    for horizon in (0.0, n, 1e6, INF):
        mean, std = predict(np.full(n, value), horizon)
        agree([mean, std], [value, 0.0], cases.Tolerance(1e-11, 1e-11 * value + 1e-300))


def test_flat_losses_with_noise_hardly_fall():
    losses = 1.0 + 0.1 * np.random.default_rng(0).standard_normal((200, 100))
    mean, std = predict(losses, 1000.0)
    # By symmetry a falls in half of them; a fall is extrapolated, a rise is not.
    assert 0.95 < np.median(mean) < 1.0
    assert (np.abs(mean - 1.0) < 3.0 * std).all()


def test_exploding_losses_are_forecast_huge():
    losses = 0.2 * 10.0 ** np.linspace(0.0, 30.0, 10)
    mean, std = predict(losses, 100.0)
    assert np.isfinite([mean, std]).all()
    assert mean > 1e6  # most of the losses are less; the last ones pass for outliers


@pytest.mark.parametrize("std", [0.0, 0.1])
def test_rising_losses_promise_no_gain(std):
    losses = 1.0 + np.arange(100) / 100 + std * np.random.default_rng(0).standard_normal(100)
    (end, _), (later, _) = predict(losses, 99.0), predict(losses, 1000.0)
    assert end == later  # not a bit is extrapolated
    assert 1.9 < later < 2.0


def test_a_straight_fall_ends_above_zero():
    # AutoLRS forecasts -7. A line is no exponential: one with c = 0 comes nearest.
    losses = np.linspace(3.0, 2.0, 100) + 0.05 * np.random.default_rng(0).standard_normal(100)
    mean, std = predict(losses, 1000.0)
    assert 0.0 < mean < 0.5
    assert std > 0.1


def test_what_is_not_known_has_a_large_std():
    stds = [predict(noisy(b=b, std=0.05), 1000.0)[1] for b in (0.001, 0.01, 0.03, 0.1)]
    assert stds[0] > stds[2] > stds[3]
    assert stds[1] > stds[2]
    horizons = np.array([100.0, 300.0, 1000.0])
    _, stds = predict(np.tile(noisy(b=0.003), (3, 1)), double(horizons))
    assert (np.diff(stds) > 0.0).all()


@pytest.mark.parametrize("index", [1, 30, 80, 99])
@pytest.mark.parametrize("height", [2.0, 100.0, 1e10, -1e10])
def test_a_spike_does_not_count(index, height):
    losses = noisy()
    mean, std = predict(losses, 1000.0)
    losses[index] += height
    agree([predict(losses, 1000.0)[0]], [mean], cases.Tolerance(0.0, 0.5 * std))
    losses[index] = NAN
    without = predict(losses, 1000.0)
    losses[index] = height if height > 3.0 else 100.0
    # The scale is another, and with it the rounding; the weights converge from elsewhere.
    agree(predict(losses, 1000.0), without, cases.Tolerance(0.02, 0.05 * std))


@pytest.mark.parametrize("bad", [INF, -INF])
@pytest.mark.parametrize("where", [[0], [3, 4, 50], list(range(20)), list(range(60, 100))])
def test_entries_that_are_not_finite_take_no_part(bad, where):
    losses = noisy()
    mean, std = predict(losses, 1000.0)
    losses[where] = NAN
    missing = predict(losses, 1000.0)
    losses[where] = bad
    agree(predict(losses, 1000.0), missing, cases.EXACT)
    assert abs(missing[0] - mean) < 3.0 * missing[1]
    assert missing[1] > 0.8 * std


def test_time_counts_from_the_first_entry_all_the_same():
    losses = noisy(std=0.01)
    later = np.concatenate([np.full(30, NAN), losses])
    mean, std = predict(losses, 200.0)
    # The grid starts at another slowest rate.
    agree(predict(later, 230.0), (mean, std), cases.Tolerance(0.05, 0.05 * std))
    agree(predict(later, 7.0), predict(later, 30.0), cases.EXACT)  # nothing is known of before


@pytest.mark.parametrize("finite", range(6))
def test_fewer_than_four_entries_say_nothing(finite):
    losses = np.array([3.0, 2.0, 1.5, 1.2, 1.1, 1.0])
    losses[finite:] = NAN
    both = np.stack([losses, np.linspace(3.0, 1.0, 6)])
    mean, std = predict(both, 20.0)
    assert np.isfinite([mean[0], std[0]]).all() == (finite >= MIN_POINTS)
    agree((mean[1], std[1]), predict(both[1], 20.0))


@pytest.mark.parametrize("n", [4, 5, 6, 8, 12])
def test_short_series_are_calibrated(n):
    bench_forecast = pytest.importorskip("bench_forecast")
    losses, of = bench_forecast.make_series("normal", n, 1000, np.random.default_rng(n))
    mean, std = predict(losses, 10.0 * n)
    covered = np.abs(mean - of["truth"]) < 1.645 * std
    assert 0.85 < covered.mean() < 0.95  # 1000 series: a std of .01


# Few values, so that runs of equal ones are frequent.
VALUES = st.floats(-10, 10).map(lambda v: round(v, 1)) | st.sampled_from(
    [NAN, INF, -INF, 0.0, 1e-300, 1e300, -1e300, 1.0, 1.0 + 1e-12]
)


@settings(max_examples=150)
@given(st.lists(VALUES, min_size=4, max_size=24))
def test_any_losses_give_a_number_that_never_rises(losses):
    horizons = double([0.0, 3.0, len(losses), 1e3, 1e9, INF])
    mean, std = predict(np.tile(losses, (6, 1)), horizons)
    if np.isfinite(losses).sum() < MIN_POINTS:
        assert np.isnan(mean).all()
        assert np.isnan(std).all()
        return
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()
    assert (mean >= 0.0).all()
    assert (std >= 0.0).all()
    largest = np.abs(np.where(np.isfinite(losses), losses, 0.0)).max()
    assert (np.diff(mean / (largest or 1.0)) <= 1e-12).all()


def test_a_batch_is_each_alone():
    losses = np.stack([noisy(40, seed=i, b=0.01 * (i + 1)) for i in range(6)]).reshape(2, 3, 40)
    losses[0, 1, 5] = NAN
    losses[1, 2] = NAN
    mean, std = predict(losses, 400.0)
    assert mean.shape == std.shape == (2, 3)
    for index in np.ndindex(2, 3):
        agree((mean[index], std[index]), predict(losses[index], 400.0))
    assert predict(losses[:0], 400.0)[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("batch", "horizons", "expected"),
    [
        ((), (), ()),
        ((), (4,), (4,)),
        ((3,), (3,), (3,)),
        ((3,), (2, 1), (2, 3)),
        ((3, 1), 4, (3, 4)),
    ],
)
def test_horizons_broadcast(batch, horizons, expected):
    losses = np.stack([noisy(30, seed=i) for i in range(3)])[: int(np.prod(batch))]
    losses = losses.reshape(*batch, 30)
    horizon = 30.0 + 10.0 * np.random.default_rng(0).random(horizons)
    for dtype in (torch.float64, torch.float32, torch.int32):
        of = torch.as_tensor(horizon).to(dtype)
        mean, std = predict(losses, of)
        assert mean.shape == std.shape == expected
        alone = np.broadcast_to(losses, (*expected, 30)), np.broadcast_to(of.numpy(), expected)
        for index in np.ndindex(expected):
            found = predict(alone[0][index], float(alone[1][index]))
            agree((mean[index], std[index]), found)


@pytest.mark.parametrize("factor", [2.0**-40, 8.0, 1e-7, 123.4, 1e290, 1e-290])
def test_the_unit_of_the_loss_does_not_matter(factor):
    expected = [factor * v for v in predict(noisy(), 1000.0)]
    # A power of two changes no digit. Others round the losses, and 1e-16 of them is all.
    tolerance = cases.EXACT if np.log2(factor) % 1 == 0 else cases.Tolerance(1e-9, 0.0)
    agree(predict(factor * noisy(), 1000.0), expected, tolerance)


@pytest.mark.parametrize("offset", [10.0, 1e4, 1e8])
def test_an_offset_is_added_to_a_known_curve(offset):
    mean, std = predict(noisy(), 1000.0)
    # 1e-13 of the offset counts as noise; the floor's constraint is further away.
    agree(predict(noisy() + offset, 1000.0), (mean + offset, std), cases.Tolerance(0, 0.03 * std))


def test_a_loss_near_zero_is_forecast_near_zero():
    mean, std = predict(noisy(a=1.0, b=0.05, c=0.0, std=0.02), 1000.0)
    assert 0.0 <= mean < 0.01
    assert 0.0 < std < 0.01
    for losses in (-np.ones(20), -noisy(20)):
        mean, std = predict(losses, 200.0)
        assert 0.0 <= mean < 0.2  # there are no negative losses in the model


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_results_have_the_type_of_the_losses(dtype, expected):
    losses = torch.tensor([32, 16, 9, 5, 3, 2, 2, 1], dtype=dtype)
    found = forecast(losses, 20)
    assert {v.dtype for v in found} == {expected}
    agree(found, predict(losses.double().numpy(), 20.0), cases.Tolerance(1e-6, 0.0))
    assert not any(v.requires_grad for v in forecast(losses.double().requires_grad_(), 20))


def test_the_host_never_waits():
    losses, horizon = double(np.stack([noisy(), np.full(100, NAN)])), double([500.0, 900.0])
    with NoReadingOps(), NoReadingMethods():
        mean, std = forecast(losses, horizon)
        forecast(losses.float(), 1000)
    assert mean[0].isfinite() & std[0].isfinite() & mean[1].isnan()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_do_not_depend_on_values(device):
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        losses = torch.empty(2, 1, 9, device=device)
        for horizon in (torch.empty(3, device=device), 20.0):
            mean, std = forecast(losses, horizon)
            assert mean.shape == std.shape == ((2, 1) if isinstance(horizon, float) else (2, 3))
            assert mean.device.type == std.device.type == device


@pytest.mark.gpu
def test_a_gpu_finds_the_same_and_the_host_never_waits():
    losses = double(np.stack([noisy(seed=i) for i in range(3)]))
    losses[1, 4] = NAN
    on_gpu = losses.cuda()
    forecast(on_gpu, 1000)  # libraries start
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = forecast(on_gpu, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = forecast(on_gpu, 1000)
    graph.replay()
    agree([v.cpu() for v in found], predict(losses, 1000))
    agree([v.cpu() for v in replayed], predict(losses, 1000))


FOUR = torch.ones(4)
ERRORS = {
    "short": (FOUR[:3], 9.0, r"at least 4 entries.*shape \(3,\): record more updates"),
    "number": (torch.ones(()), 9.0, r"at least 4 entries in the last dimension, got shape \(\)"),
    "negative": (FOUR, -1, r"horizon must be an update number, 0 or more, got -1"),
    "nan": (FOUR, NAN, r"horizon must be an update number.*nan"),
    "batch": (FOUR.expand(2, 4), torch.ones(3), r"horizon \(3,\) must broadcast.*\(2, 4\): insert"),
    "device": (FOUR, torch.ones((), device="meta"), r"horizon is on meta, losses on cpu: move it"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_the_way_out(case):
    losses, horizon, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        forecast(losses, horizon)


def test_losses_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"losses must be a tensor, got list: torch.as_tensor"):
        forecast([1.0, 0.9, 0.8, 0.7], 10)


def test_the_package_has_it():
    assert forecast_of_package is forecast


def test_half_the_error_of_autolrs_and_calibrated():
    bench_forecast = pytest.importorskip("bench_forecast")
    columns, kinds = bench_forecast.measure(12)
    verdicts = bench_forecast.checks(bench_forecast.rows(columns, kinds)[-1])
    assert len(verdicts) == 3
    assert all(passed for _, passed in verdicts), verdicts


def test_the_opponent_finds_a_curve_and_fails_on_a_flat_one():
    bench_forecast = pytest.importorskip("bench_forecast")
    # So much noise, in absolute terms, that its spline follows the curve (see its smoothing).
    losses = 1e3 * curve(np.arange(200), 2.0, 0.03, 1.0)
    assert abs(bench_forecast.opponent_or_nan(losses, 2000.0) / 1e3 - 1.0) < 0.05
    failures = [bench_forecast.opponent_or_nan(noisy(a=0.0, seed=i), 1e3) for i in range(20)]
    assert np.isnan(failures).any()


def test_the_benchmark_end_to_end(tmp_path, capsys, monkeypatch):
    bench_forecast = pytest.importorskip("bench_forecast")
    monkeypatch.setattr(bench_forecast, "QUICK_SERIES", 2)
    monkeypatch.setattr(bench_forecast, "LENGTHS", (10, 40))
    numbers = tmp_path / "forecast.json"
    assert bench_forecast.main(["--quick", "--json", str(numbers)]) == 0
    bench = json.loads(numbers.read_text())
    printed = capsys.readouterr().out
    assert all(f"| {row['name']} |" in printed for row in bench["rows"])
    assert bench["rows"][-1]["series"] == 16
    with pytest.raises(SystemExit):
        bench_forecast.main(["--json", str(tmp_path / "no" / "where.json")])
