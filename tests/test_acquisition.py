"""Acquisitions: against scipy's normal distribution, integration and hand-computed numbers."""

import math

import cases
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_no_sync import NoReadingMethods, NoReadingOps

from lrs_ext.autolrs.acquisition import expected_improvement, lower_confidence_bound

# Rounding z^2 / 2 and the cancellation of two terms each cost a factor of z^2: z^4 eps at z = -30.
CLOSED_FORM = cases.Tolerance(rtol=2e-10, atol=0.0)
INTEGRAL = cases.Tolerance(rtol=1e-7, atol=0.0)
FLOAT32 = cases.Tolerance(rtol=1e-4, atol=0.0)  # likewise, to z = -5
Z = [-30.0, -12.5, -6.0, -1.5, -0.1, 0.0, 0.1, 1.5, 6.0, 12.0, 100.0]


def improvement(mean, std, best):
    mean, std, best = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, std, best))
    return expected_improvement(mean, std, best)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), expected, tolerance.rtol, tolerance.atol)


@pytest.mark.parametrize("std", [1e-3, 1.0, 50.0])
def test_improvement_is_the_closed_form_of_scipy(std):
    norm = pytest.importorskip("scipy.stats").norm
    z = np.array(Z)
    expected = std * (z * norm.cdf(z) + norm.pdf(z))
    close(improvement(-z * std, std, 0.0), expected, CLOSED_FORM)


@pytest.mark.parametrize("z", [z for z in Z if z < 50])
def test_improvement_is_an_expectation(z):
    integrate = pytest.importorskip("scipy.integrate")

    def weighted_gain(u):  # f = u standard deviations below best
        return u * math.exp(-0.5 * (u - z) ** 2) / math.sqrt(2 * math.pi)

    high = max(z, 0.0) + 12.0 / max(1.0, -z / 4)  # beyond, the density is negligible
    expected, _ = integrate.quad(weighted_gain, 0.0, high, epsabs=0, epsrel=1e-9, limit=200)
    close(improvement(2.0 - 3.0 * z, 3.0, 2.0), 3.0 * expected, INTEGRAL)


def test_improvement_by_hand():
    # At mean = best half of the normal counts: std / sqrt(2 pi).
    close(improvement(1.0, 2.0, 1.0), 2.0 / math.sqrt(2 * math.pi), CLOSED_FORM)
    # phi(1) + Phi(1) and phi(1) - Phi(-1), from a printed table.
    close(improvement([0.0, 2.0], 1.0, 1.0), [1.08331547, 0.08331547], INTEGRAL)


def test_without_spread_the_gain_is_left():
    close(improvement([0.5, 1.0, 3.0], 0.0, 1.0), [0.5, 0.0, 0.0], cases.EXACT)


@given(*[st.floats(-1e6, 1e6)] * 2, st.floats(0, 1e6), st.sampled_from(["float32", "float64"]))
def test_improvement_is_finite_and_not_below_the_certain_gain(mean, best, std, dtype):
    mean, best, std = (torch.tensor(v, dtype=getattr(torch, dtype)) for v in (mean, best, std))
    found = expected_improvement(mean, std, best)
    gain = (best - mean).clamp(min=0.0)
    assert found.isfinite()
    assert found >= gain * (1 - 2 * torch.finfo(found.dtype).eps)
    assert found >= 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_improvement_is_finite_at_the_edges_of_the_type(dtype):
    info = torch.finfo(dtype)
    std = torch.tensor([0.0, info.smallest_normal, 1e-30, 1e30], dtype=dtype)
    for mean in (-1e30, -1.0, 0.0, 1.0, 1e30):
        found = expected_improvement(torch.tensor(mean, dtype=dtype), std, 0.0)
        assert found.isfinite().all()
        assert (found >= max(-mean, 0.0) * (1 - 2 * info.eps)).all()
        assert (found.diff() >= 0.0).all()  # the less is known, the more there is to gain
    # Where the terms become subnormal, rounding takes all that their difference has.
    assert (
        expected_improvement(torch.linspace(0, 50, 100_001, dtype=dtype), std[3] / 1e30, 0.0) >= 0.0
    ).all()


def test_single_precision_follows():
    z = torch.linspace(-5, 5, 101)
    close(expected_improvement(-z, torch.ones(()), 0.0), improvement(-z, 1.0, 0.0), FLOAT32)


def test_the_bound_by_hand():
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.5, 2.0])
    close(lower_confidence_bound(mean, std, 2.0), [1.0, 1.0, -1.0], cases.EXACT)
    close(lower_confidence_bound(mean, std, 0.0), mean, cases.EXACT)
    kappa = torch.tensor([[0.0], [1.0]])
    close(lower_confidence_bound(mean, std, kappa), [[1.0, 2.0, 3.0], [1.0, 1.5, 1.0]], cases.EXACT)


@pytest.mark.parametrize("acquisition", [expected_improvement, lower_confidence_bound])
def test_shapes_broadcast(acquisition):
    mean, std, third = torch.randn(4, 1, 6), torch.rand(5, 1), torch.randn(4, 5, 6)
    found = acquisition(mean, std, third)
    assert found.shape == (4, 5, 6)
    for i, j, k in np.ndindex(4, 5, 6):
        alone = acquisition(mean[i, 0, k], std[j, 0], third[i, j, k])
        close(found[i, j, k], alone, FLOAT32)


@pytest.mark.parametrize("acquisition", [expected_improvement, lower_confidence_bound])
def test_the_host_never_waits(acquisition):
    mean, std = torch.randn(6), torch.tensor([0.0, 1.0, 2.0, 0.0, 1e-9, 3.0])
    with NoReadingOps(), NoReadingMethods():
        acquisition(mean, std, mean.amin())
        acquisition(mean, std, 0.5)
        found = acquisition(mean.to("meta"), std.to("meta"), mean.amin().to("meta"))
    assert (found.shape, found.device.type) == ((6,), "meta")
