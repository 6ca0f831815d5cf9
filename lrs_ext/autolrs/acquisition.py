"""How promising an untried learning rate is, given what the surrogate says of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNDERFLOW = -40.0  # standard deviations: the normal density is 0 there in float64, too


def lower_confidence_bound(mean: Tensor, std: Tensor, kappa: float | Tensor) -> Tensor:
    """Returns ``mean - kappa * std``, to be minimised: what f may well be at its best.

    Args:
        mean, std: posterior of f, shapes that broadcast, units of f.
        kappa: weight of the unknown, dimensionless; about 2 is usual, 0 goes by the mean alone.
            From about 1e3 the mean no longer counts: the points fill the space.

    Returns:
        The bound, units of f.

    Source: Srinivas, Krause, Kakade, Seeger: Gaussian Process Optimization in the Bandit Setting,
        ICML 2010, arXiv 0912.3995 (there for maximisation, as GP-UCB).

    >>> mean, std = torch.tensor([1.0, 1.2, 2.0]), torch.tensor([0.0, 0.5, 0.25])
    >>> lower_confidence_bound(mean, std, 2.0).tolist()
    [1.0, 0.200..., 1.5]
    """
    return mean - kappa * std


def expected_improvement(mean: Tensor, std: Tensor, best: float | Tensor) -> Tensor:
    """Returns ``E[max(best - f, 0)]`` for f ~ N(mean, std^2), to be maximised.

    With ``z = (best - mean) / std`` that is ``(best - mean) Phi(z) + std phi(z)``, Phi and phi the
    normal distribution and density; at std 0 it is ``max(best - mean, 0)``.

    Args:
        mean, std: posterior of f, shapes that broadcast, units of f.
        best: the value to improve on, such as the lowest observation or posterior mean.

    Returns:
        The expected improvement, never negative, units of f. It is 0 from z of about -13 down in
        float32, -38 in float64.

    Source: Jones, Schonlau, Welch: Efficient Global Optimization of Expensive Black-Box Functions,
        Journal of Global Optimization 13, 1998, equation 15.

    >>> mean, std = torch.tensor([1.0, 1.0, 0.5, 2.0]), torch.tensor([0.0, 1.0, 0.0, 0.01])
    >>> expected_improvement(mean, std, best=1.0)
    tensor([0.0000, 0.3989, 0.5000, 0.0000])
    """
    gain = best - mean
    # h(t) = phi(t) + t Phi(t) has h(z) = z + h(-z): only t <= 0 is left, where nothing is large.
    # Phi comes from erfc because torch.special.ndtr is 1 + erf, which is 0 far in the tail.
    t = (-gain.abs() / torch.where(std > 0.0, std, 1.0)).clamp(min=UNDERFLOW)
    density = torch.exp(-0.5 * t.square()) * (1.0 / math.sqrt(2.0 * math.pi))
    excess = density + 0.5 * t * torch.erfc(t * -math.sqrt(0.5))
    return gain.clamp(min=0.0) + std * excess.clamp(min=0.0)
