"""The Gaussian process: against a dense solve and scikit-learn, and at its edges."""

import contextlib

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_no_sync import NoReadingMethods, NoReadingOps
from torch._subclasses import FakeTensorMode

from lrs_ext.autolrs import surrogate
from lrs_ext.autolrs.surrogate import LENGTHSCALES, NOISE_STDS, gp_posterior, matern52

# Both sides solve in float64; equal positions without noise make a condition number of about 1e4.
ORACLE = cases.Tolerance(rtol=1e-9, atol=1e-9)
NAN, INF = float("nan"), float("inf")
X = [-4.0, -3.2, -2.9, -2.0, -1.1]
Y = [2.31, 1.9, 1.4, 1.62, 2.2]
NOISE = [0.0, 0.1, 0.02, 0.3, 0.05]
QUERY = [-5.0, -4.0, -3.05, -2.0, -0.5, 3.0]


def double(*values):
    return [torch.as_tensor(value, dtype=torch.float64) for value in values]


def agree(actual, expected, tolerance=ORACLE):
    for ours, theirs in zip(actual, expected, strict=True):
        ours, theirs = (np.asarray(v, dtype=np.float64) for v in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, tolerance.rtol, tolerance.atol)


def standardised(x, y, noise):
    x, y, noise = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (x, y, noise)))
    seen = np.isfinite(x) & np.isfinite(y) & np.isfinite(noise)
    x, y, noise = x[seen], y[seen], noise[seen]
    center, scale = (y.mean(), y.std()) if len(y) else (0.0, 1.0)
    scale = scale if len(set(y)) > 1 else 1.0
    return x, (y - center) / scale, (noise / scale) ** 2, center, scale


def mixture(posteriors, center, scale):
    means, stds, log_likelihoods = (np.array(column) for column in zip(*posteriors, strict=True))
    weights = np.exp(log_likelihoods - log_likelihoods.max())[:, None]
    weights = weights / weights.sum()
    mean = (weights * means).sum(0)
    second_moment = (weights * (stds**2 + means**2)).sum(0)
    return center + scale * mean, scale * np.sqrt(np.maximum(second_moment - mean**2, 0.0))


def oracle(x, y, noise, query, lengthscales=LENGTHSCALES, noise_stds=NOISE_STDS):
    """The same by dense solves, one pair after the other."""
    x, targets, variance, center, scale = standardised(x, y, noise)

    def kernel(a, b, lengthscale):
        r = np.sqrt(5.0) * np.abs(a[:, None] - b[None, :]) / lengthscale
        return (1.0 + r + r**2 / 3.0) * np.exp(-r)

    def posterior(lengthscale, noise_std):
        diagonal = variance + noise_std**2 + surrogate.JITTER
        covariance = kernel(x, x, lengthscale) + np.diag(diagonal)
        across = kernel(x, np.asarray(query), lengthscale)
        solved = np.linalg.solve(covariance, np.column_stack([targets, across]))
        explained = (across * solved[:, 1:]).sum(0)
        log_det = np.linalg.slogdet(covariance)[1]
        return (
            across.T @ solved[:, 0],
            np.sqrt(np.maximum(1.0 - explained, 0.0)),
            -0.5 * (targets @ solved[:, 0] + log_det),
        )

    pairs = [posterior(length, std) for length in lengthscales for std in noise_stds]
    return mixture(pairs, center, scale)


def scikit_learn(x, y, noise, query, lengthscale, noise_std):
    """Mean, std and log likelihood of one pair, on standardised targets."""
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    x, targets, variance, center, scale = standardised(x, y, noise)
    model = gaussian_process.GaussianProcessRegressor(
        gaussian_process.kernels.Matern(lengthscale, nu=2.5),
        alpha=variance + noise_std**2 + surrogate.JITTER,
        optimizer=None,
    ).fit(x[:, None], targets)
    mean, std = model.predict(np.asarray(query)[:, None], return_std=True)
    return (mean, std, model.log_marginal_likelihood_value_), center, scale


@pytest.mark.parametrize("noise", [0.0, 0.2, NOISE], ids=["exact", "equal noise", "own noise"])
@pytest.mark.parametrize("lengthscale", LENGTHSCALES)
@pytest.mark.parametrize("noise_std", NOISE_STDS)
def test_one_pair_is_the_regressor_of_scikit_learn(lengthscale, noise_std, noise):
    (mean, std, _), center, scale = scikit_learn(X, Y, noise, QUERY, lengthscale, noise_std)
    x, y, query = double(X, Y, QUERY)
    noise = noise if isinstance(noise, float) else double(noise)[0]
    ours = gp_posterior(x, y, noise, query, lengthscales=[lengthscale], noise_stds=[noise_std])
    agree(ours, (center + scale * mean, scale * std))


def test_pairs_count_by_the_likelihood_of_scikit_learn():
    grid = [(length, std) for length in LENGTHSCALES for std in NOISE_STDS]
    found = [scikit_learn(X, Y, NOISE, QUERY, *pair) for pair in grid]
    _, center, scale = found[0]
    expected = mixture([posterior for posterior, _, _ in found], center, scale)
    agree(gp_posterior(*double(X, Y, NOISE, QUERY)), expected)
    agree(oracle(X, Y, NOISE, QUERY), expected)


# Rounded, so that positions coincide often.
POINTS = st.lists(
    st.tuples(
        st.floats(-6, 0).map(lambda v: round(v, 1)),
        st.floats(-10, 10).map(lambda v: round(v, 2)) | st.sampled_from([NAN, INF, -INF, 1e6]),
        st.floats(0, 3),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100)
@given(POINTS)
def test_any_points_match_a_dense_solve(points):
    x, y, noise = (list(column) for column in zip(*points, strict=True))
    mean, std = gp_posterior(*double(x, y, noise, QUERY))
    scale = standardised(x, y, noise)[-1]
    expected = oracle(x, y, noise, QUERY)
    # The oracle's variance is a difference, so its std near 0 has half of the digits.
    agree((mean / scale, std / scale), [v / scale for v in expected], cases.Tolerance(1e-7, 1e-7))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("column", ["x", "y", "noise"])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_point_that_is_not_finite_takes_no_part(column, index, bad):
    kept = {"x": X, "y": Y, "noise": NOISE}
    spoilt = {key: list(values) for key, values in kept.items()}
    spoilt[column][index] = bad
    kept = [np.delete(values, index) for values in kept.values()]
    agree(gp_posterior(*double(*spoilt.values(), QUERY)), gp_posterior(*double(*kept, QUERY)))


def test_without_an_observation_the_prior_is_left():
    agree(gp_posterior(*double(X, [NAN] * 5, NOISE, QUERY)), ([0.0] * 6, [1.0] * 6))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e8])
def test_a_constant_counts_as_std_one(value):
    x, noise = np.linspace(-4, -1, 6), np.linspace(0, 0.3, 6)  # six times 0.1 sum to less than 0.6
    mean, std = gp_posterior(*double(x, [value] * 6, noise, QUERY))
    agree((mean,), ([value] * 6,))
    agree((std,), oracle(x, [0.0] * 6, noise, QUERY)[1:])


def test_one_point_pulls_by_its_weight():
    # A single observation is its own mean: its value everywhere, known best where it is.
    mean, std = gp_posterior(*double([-2.0], [3.0], 0.0, [-2.0, -1.0, 9.0]), noise_stds=[0.5])
    agree((mean,), ([3.0] * 3,))
    agree((std[::2],), ([np.sqrt(1 - 1 / 1.25), 1.0],), cases.Tolerance(1e-6, 0.0))
    assert std[0] < std[1] < std[2]


def test_equal_positions_share_what_they_saw():
    x, y, query = double([-2.0, -2.0, -1.0, -1.0], [1.0, 3.0, 5.0, 7.0], [-2.0, -1.0])
    mean, std = gp_posterior(x, y, 0.0, query, lengthscales=[0.1], noise_stds=[0.0])
    agree((mean,), ([2.0, 6.0],), cases.Tolerance(1e-6, 0.0))
    assert (std < 1e-4).all()


def test_a_noisy_observation_counts_for_less():
    x, y, query = double([-2.0, -1.0], [1.0, 3.0], [-2.0])
    distance = [
        abs(gp_posterior(x, y, double([noise, 0.0])[0], query)[0] - 1.0)
        for noise in (0.0, 1, 1e200)
    ]
    assert distance[0] < distance[1] < distance[2]
    assert distance[2] < INF


def test_units_and_order_do_not_matter():
    mean, std = gp_posterior(*double(X, Y, NOISE, QUERY))
    x, y, noise, query = (v.flip(0) for v in double(X, Y, NOISE, QUERY))
    mean, std = mean.flip(0), std.flip(0)
    agree(gp_posterior(x, y, noise, query), (mean, std))
    agree(gp_posterior(x + 7, -5e3 * y + 2, 5e3 * noise, query + 7), (-5e3 * mean + 2, 5e3 * std))


def test_a_batch_is_each_alone():
    x, noise, query = torch.randn(3, 5).double(), torch.rand(2, 3, 5).double(), double(QUERY)[0]
    y = torch.randn(2, 1, 5).double()
    y[0, 0, 3] = NAN
    mean, std = gp_posterior(x, y, noise, query)
    assert mean.shape == std.shape == (2, 3, 6)
    for i, j in np.ndindex(2, 3):
        agree((mean[i, j], std[i, j]), gp_posterior(x[j], y[i, 0], noise[i, j], query))
    batch = gp_posterior(double(X)[0], double(Y)[0], 0.1, query.expand(4, 6))
    agree(batch, [v.expand(4, 6) for v in gp_posterior(*double(X, Y, 0.1), query)])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_results_have_the_type_of_the_observations(dtype, expected):
    x, query = double(X, QUERY)
    y = torch.tensor([4, 2, 1, 3, 8], dtype=dtype)
    found = gp_posterior(x, y, 0.1, query)
    assert {v.dtype for v in found} == {expected}
    agree(found, oracle(X, [4, 2, 1, 3, 8], 0.1, QUERY), cases.Tolerance(1e-6, 1e-6))


def test_a_pair_without_a_factor_does_not_count(monkeypatch):
    arguments = double([-2.0, -2.0, -1.0], [1.0, 3.0, 2.0], 0.0, QUERY)
    monkeypatch.setattr(surrogate, "JITTER", -0.01)  # more than 0.05^2, less than 0.4^2
    expected = gp_posterior(*arguments, noise_stds=[0.4])
    agree(gp_posterior(*arguments, noise_stds=[0.05, 0.4]), expected)


def test_without_any_factor_the_prior_is_left(monkeypatch):
    monkeypatch.setattr(surrogate, "JITTER", -3.0)
    expected = np.full(6, np.mean(Y)), np.full(6, np.std(Y))
    agree(gp_posterior(*double(X, Y, NOISE, QUERY)), expected)


def test_the_kernel_is_one_at_no_distance_and_falls():
    values = matern52(double(np.linspace(0, 50, 101))[0].reshape(1, -1), (0.3, 2.4))
    assert values.shape == (2, 1, 101)
    assert (values[..., 0] == 1.0).all()
    assert (values.diff() < 0.0).all()
    assert (values[0] <= values[1]).all()


def test_the_host_never_waits():
    x, y, noise, query = double(X, [*Y[:4], NAN], NOISE, QUERY)
    with NoReadingOps(), NoReadingMethods():
        found = gp_posterior(x, y, noise, query)
        gp_posterior(x.float(), y.float(), 0.1, query.float())
    assert all(v.isfinite().all() for v in found)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_do_not_depend_on_values(device):
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        x, noise = torch.empty(5, device=device), torch.empty(3, 5, device=device)
        for each in (noise, 0.1):
            y = torch.empty(2, 1, 5, device=device)
            mean, std = gp_posterior(x, y, each, torch.empty(7, device=device))
            assert mean.shape == std.shape == ((2, 3, 7) if each is noise else (2, 1, 7))
            assert mean.device.type == std.device.type == device


@pytest.mark.gpu
def test_a_gpu_finds_the_same_and_the_host_never_waits():
    arguments = double(X, [*Y[:4], NAN], NOISE, QUERY)
    on_gpu = [v.cuda() for v in arguments]
    gp_posterior(*on_gpu)  # libraries start
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gp_posterior(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    agree([v.cpu() for v in found], gp_posterior(*arguments))


X5, Q6 = torch.zeros(5), torch.zeros(6)
ERRORS = {
    "y": ((X5, Q6, 0.0, Q6), {}, r"one entry a point .* x \(5,\), y \(6,\).*pass a float"),
    "noise": ((X5, X5, torch.zeros(1), Q6), {}, r"noise \(1,\).*pass a float for a noise"),
    "number": ((X5, torch.zeros(()), 0.0, Q6), {}, r"y must have at least one dimension"),
    "query": ((X5, X5, 0.0, torch.zeros(())), {}, r"query must .*query.reshape\(1\)"),
    "empty": ((X5[:0], X5[:0], 0.0, Q6), {}, "at least one; its y may be NaN"),
    "batch": ((X5, X5.expand(2, 5), 0.0, Q6.expand(3, 6)), {}, r"must broadcast.*query \(3, 6\)"),
    "device": ((X5, X5, 0.0, Q6.to("meta")), {}, r"query is on meta, x on cpu: move it"),
    "lengths": ((X5, X5, 0.0, Q6), {"lengthscales": (1.0, 0.0)}, r"finite and positive.*0.0\)"),
    "no length": ((X5, X5, 0.0, Q6), {"lengthscales": ()}, r"at least one, got \(\)"),
    "noises": ((X5, X5, 0.0, Q6), {"noise_stds": (NAN,)}, r"noise_stds must be finite"),
    "negative": ((X5, X5, 0.0, Q6), {"noise_stds": (-0.1,)}, r"and not negative"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_the_way_out(case):
    arguments, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        gp_posterior(*arguments, **options)


def test_points_must_be_tensors():
    with pytest.raises(TypeError, match=r"y must be a tensor, got list: torch.as_tensor"):
        gp_posterior(torch.zeros(2), [0.0, 1.0], 0.1, torch.zeros(1))
