"""What a few noisy trials say about every learning rate: a Gaussian process in one dimension.

Nothing here waits for the device: shapes are fixed, and what does not count is masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lrs_ext.autolrs.checks import check_tensors

LENGTHSCALES = (0.3, 0.6, 1.2, 2.4)  # units of x: decades of learning rate
NOISE_STDS = (0.05, 0.15, 0.4)  # units of the standardised observations
JITTER = 1e-10  # variance: keeps equal positions without noise positive definite
CONSTANT = 1e-12  # a spread below this share of the largest observation is rounding
MAX_VARIANCE = 1e100  # an observation with so much noise says nothing
PRIOR_FACTOR = 1e150  # times the identity, a Cholesky factor that lets no observation count


def gp_posterior(
    x: Tensor,
    y: Tensor,
    noise: Tensor | float,
    query: Tensor,
    *,
    lengthscales: Sequence[float] = LENGTHSCALES,
    noise_stds: Sequence[float] = NOISE_STDS,
) -> tuple[Tensor, Tensor]:
    """Returns a Gaussian process's mean and std of f at `query`, given observations y = f(x).

    The standardised f is N(0, k), k Matern 5/2 with outputscale 1, and y adds the variance
    ``noise^2 + s^2``. Each pair of a lengthscale l and a noise std s counts by p(y | l, s).

    Args:
        x: positions, (..., n), n >= 1; AutoLRS passes log10 of learning rates, so decades.
        y: observations, (..., n). A point that is not finite takes no part; a constant y counts
            as std 1, and no point at all as mean 0, std 1.
        noise: std of each observation in units of y, (..., n) or one number; 0 is allowed.
        query: positions, (..., m). Batch dimensions broadcast.
        lengthscales, noise_stds: the values of l, units of x, and of s, shares of the std of y.

    Returns:
        Mean and std of f (not of a new observation), (..., m), units of y, float64 inside.

    Raises:
        TypeError: `x`, `y` or `query` is no tensor.
        ValueError: shapes or devices do not match, or an l or s is out of range.

    Source: Rasmussen, Williams: Gaussian Processes for Machine Learning, 2006, algorithm 2.1.

    >>> x, y = torch.tensor([-3.0, -2.0, -1.0]), torch.tensor([2.0, 1.0, float("inf")])
    >>> mean, std = gp_posterior(x, y, 0.1, torch.tensor([-3.0, -2.0, 5.0]))
    >>> mean, std
    (tensor([1.9338, 1.0662, 1.4992]), tensor([0.1607, 0.1607, 0.5000]))
    """
    check_tensors(x=x, y=y, query=query)
    dtype = torch.promote_types(y.dtype, torch.float32)
    _check_grid("lengthscales", lengthscales, lowest="positive")
    _check_grid("noise_stds", noise_stds, lowest="not negative")
    x, y, noise, query = _broadcast(x, y, noise, query)
    points = torch.stack([x, y, noise])
    missing = ~(points.abs() < math.inf).all(0)  # NaN is not less
    x, y, noise = points.masked_fill(missing, 0.0).unbind()
    center, scale, targets = _standardise(y, missing)

    distance = (x.unsqueeze(-1) - torch.cat([x, query], -1).unsqueeze(-2)).abs()
    kernel = matern52(distance, lengthscales)
    variance = (noise / scale).square().clamp(max=MAX_VARIANCE)
    factor = _cholesky(kernel[..., : x.shape[-1]], variance, missing, noise_stds)
    across = kernel[..., x.shape[-1] :].masked_fill(missing[..., None, :, None], 0.0)
    mean, std = _mixture(*_posteriors(factor, targets, across))
    return (center + scale * mean).to(dtype), (scale * std).to(dtype)


def matern52(distance: Tensor, lengthscales: Sequence[float]) -> Tensor:
    """Returns k = (1 + r + r^2 / 3) exp(-r), r = sqrt(5) distance / l, for each lengthscale l.

    Args:
        distance: (..., n, m), not negative.

    Returns:
        (..., lengthscales, n, m).

    Source: Rasmussen, Williams: Gaussian Processes for Machine Learning, 2006, equation 4.17.

    >>> matern52(torch.tensor([[0.0, 1.0, 2.0]]), (1.0,))
    tensor([[[1.0000, 0.5240, 0.1387]]])
    """
    r = torch.stack([distance * (math.sqrt(5.0) / each) for each in lengthscales], -3)
    return (r * (r / 3.0 + 1.0) + 1.0) * torch.exp(-r)


def _standardise(y: Tensor, missing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean and std of what is not missing, (..., 1), and (y - mean) / std, (..., n).

    The std of a constant y counts as 1. A missing entry is 0 before and after.
    """
    count = y.shape[-1] - missing.sum(-1, keepdim=True)
    center = y.sum(-1, keepdim=True) / count.clamp(min=1)
    deviation = (y - center).masked_fill(missing, 0.0)
    scale = (deviation.square().sum(-1, keepdim=True) / count.clamp(min=1)).sqrt()
    is_constant = scale <= CONSTANT * y.abs().amax(-1, keepdim=True)
    scale = scale.masked_fill(is_constant, 1.0)
    return center, scale, deviation / scale


def _cholesky(
    kernel: Tensor, variance: Tensor, missing: Tensor, noise_stds: Sequence[float]
) -> Tensor:
    """Factors the covariance of y under each pair of hyper-parameters.

    A missing point is independent of the others and has variance 1: log 1 = 0 leaves the
    likelihood alone. A pair that has no factor becomes the prior, with a determinant so large that
    its likelihood is 0 next to any other; if no pair has one, all count equally.

    Args:
        kernel: (..., lengthscales, n, n).
        variance, missing: of the observations, (..., n).

    Returns:
        Lower factors, (..., lengthscales, noise_stds, n, n).
    """
    diagonal = torch.stack([variance + (std * std + JITTER) for std in noise_stds], -2)
    diagonal = diagonal.masked_fill(missing.unsqueeze(-2), 1.0)
    apart = missing.unsqueeze(-1) | missing.unsqueeze(-2)
    covariance = kernel.masked_fill(apart.unsqueeze(-3), 0.0).unsqueeze(-3)
    covariance = covariance + torch.diag_embed(diagonal).unsqueeze(-4)
    factor, info = torch.linalg.cholesky_ex(covariance, check_errors=False)
    prior = PRIOR_FACTOR * torch.eye(kernel.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.where((info == 0)[..., None, None], factor, prior)


def _posteriors(factor: Tensor, targets: Tensor, across: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean and variance, (..., pairs, m), and log p(y | pair), (..., pairs).

    The likelihoods lack the constant that all pairs share.

    Args:
        factor: of the covariance, (..., lengthscales, noise_stds, n, n).
        targets: standardised observations, (..., n).
        across: kernel between observations and queries, (..., lengthscales, n, m).
    """
    whitened = torch.linalg.solve_triangular(factor, targets[..., None, None, :, None], upper=False)
    projected = torch.linalg.solve_triangular(factor, across.unsqueeze(-3), upper=False)
    mean = (whitened.mT @ projected).squeeze(-2)
    variance = (1.0 - projected.square().sum(-2)).clamp(min=0.0)
    log_likelihood = -0.5 * whitened.square().sum((-2, -1))
    log_likelihood = log_likelihood - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return mean.flatten(-3, -2), variance.flatten(-3, -2), log_likelihood.flatten(-2)


def _mixture(means: Tensor, variances: Tensor, log_likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and std of the mixture, (..., m), by the law of total variance."""
    weights = torch.softmax(log_likelihood, -1).unsqueeze(-2)
    mean = weights @ means
    variance = weights @ (variances + (means - mean).square())
    return mean.squeeze(-2), variance.sqrt().squeeze(-2)


def _check_grid(name: str, values: Sequence[float], lowest: str) -> None:
    is_allowed = all(
        math.isfinite(value) and (value > 0.0 if lowest == "positive" else value >= 0.0)
        for value in values
    )
    if not values or not is_allowed:
        raise ValueError(f"{name} must be finite and {lowest}, at least one, got {values!r}")


def _broadcast(
    x: Tensor, y: Tensor, noise: Tensor | float, query: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns all four in float64 with equal batch dimensions; raises ValueError if they differ."""
    if not isinstance(noise, Tensor):
        # Filled on the device: a copy from the host would wait, and fail in a graph capture.
        noise = torch.full((), float(noise), dtype=torch.float64, device=x.device)
    if noise.dim() == 0:
        noise = noise.expand(x.shape[-1:])
    named = {"x": x, "y": y, "noise": noise, "query": query}
    for name, values in named.items():
        if values.dim() == 0:
            raise ValueError(f"{name} must have at least one dimension: use {name}.reshape(1)")
        if values.device != x.device:
            raise ValueError(f"{name} is on {values.device}, x on {x.device}: move it with .to()")
    shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in named.items())
    n = x.shape[-1]
    if n == 0:
        raise ValueError("x has no point: pass at least one; its y may be NaN, which leaves it out")
    if y.shape[-1] != n or noise.shape[-1] != n:
        raise ValueError(
            f"x, y and noise must have one entry a point in their last dimension, got {shapes}: "
            "pass a float for a noise that all share"
        )
    try:
        batch = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            *(values.shape[:-1] for values in named.values())
        )
    except RuntimeError:
        raise ValueError(
            f"the dimensions before the last must broadcast, got {shapes}: insert 1 where one "
            "tensor serves a whole batch"
        ) from None
    x, y, noise, query = (
        values.to(torch.float64).expand(*batch, values.shape[-1]) for values in named.values()
    )
    return x, y, noise, query
