"""What the losses of a short trial will have come to at a later update.

Nothing here waits for the device: shapes are fixed, and what does not count is masked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrs_ext.autolrs.checks import check_tensors

MIN_POINTS = 4  # a, b, c and the noise
SLOWEST = 0.03  # of the rates b, times the length of the series: nearly a straight line
FASTEST = 4.0  # of the rates b, per update: over at once
NUM_RATES = 24
NUM_GAINS = 10
REACH = 5.0  # standard deviations: gains further from the best are not looked at
ROBUST_PASSES = 2  # over all rates, to find the outliers
ZOOM_PASSES = 3  # each over the rates that the last one left
NEGLIGIBLE = 15.0  # log posterior below that of the best rate
CUTOFF = 6.0  # standard deviations: a residual from there on does not count
MAX_CORRELATION = 0.98  # a hundred residuals so alike count as one
ROUNDING = 1e-13  # share of the largest loss: noise that is always there
TINY = 1e-60  # instead of 0, where no update that counts tells a rate's gain


class _Posterior(NamedTuple):
    """Weights of the rates b, and moments of L(t) = m + a (u(t) - mean u), u(t) = exp(-b t).

    The level m is a mean(u) + c: for a given rate, losses tell m and a independently. All are
    (..., rates).
    """

    log_rate: Tensor
    weight: Tensor  # sum 1
    mean_u: Tensor  # over the updates that count
    gain: Tensor  # posterior mean of a
    level: Tensor  # posterior mean of m
    gain_variance: Tensor
    level_variance: Tensor
    covariance: Tensor


def forecast(losses: Tensor, horizon: float | Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and std of the loss without its noise at update `horizon`.

    Bayesian fit of ``L(t) = a exp(-b t) + c``, b > 0, c >= 0, to the raw losses of updates
    t = 0 ... n-1; uniform in log b, a and c, with unknown noise and down-weighted outliers. Only
    a >= 0 is extrapolated: a < 0 counts as its L(n-1). So the mean never rises with the horizon, a
    flat series gives its level, a rising one its end, and the std is large where b is not known.
    A rise that begins in the last fifth of a falling series counts as outliers.

    Args:
        losses: (..., n), n >= 4, not negative. Entries that are not finite take no part.
        horizon: update number, as in `losses`; inf means c. A number, or a tensor that broadcasts
            with the dimensions before the last.

    Returns:
        Mean (never negative) and std, units of the loss, float64 inside; NaN where fewer than 4
        entries are finite. The std is that of the model: of another curve it knows nothing.

    Raises:
        TypeError: `losses` is no tensor.
        ValueError: shapes or devices do not match, or n or a number for the horizon is too small.

    Source: Jin et al., AutoLRS, ICLR 2021, arXiv 2105.10762 (the model).

    >>> t, noise = torch.arange(100.0), 0.01 * torch.randn(100, generator=torch.manual_seed(0))
    >>> forecast(2.0 * torch.exp(-0.03 * t) + 1.0 + noise, 1000)
    (tensor(0.9951), tensor(0.0037))
    """
    check_tensors(losses=losses)
    dtype = torch.promote_types(losses.dtype, torch.float32)
    losses, horizon = _check(losses, horizon)
    seen = losses.abs() < math.inf  # NaN is not less
    losses = losses.masked_fill(~seen, 0.0)
    scale = losses.abs().amax(-1, keepdim=True)
    y = losses / scale.masked_fill(scale == 0.0, 1.0)

    # Counted from the first finite loss, which bounds a.
    start = seen.to(torch.int64).argmax(-1, keepdim=True)
    t = (torch.arange(losses.shape[-1], device=losses.device) - start).clamp(min=0)
    posterior = _fit(t.to(torch.float64), y, seen)
    mean, std = _predict(posterior, (horizon.unsqueeze(-1) - start).clamp(min=0.0))
    is_known = seen.sum(-1, keepdim=True) >= MIN_POINTS
    mean, std = (torch.where(is_known, scale * v, math.nan).squeeze(-1) for v in (mean, std))
    return mean.to(dtype), std.to(dtype)


def _fit(t: Tensor, y: Tensor, seen: Tensor) -> _Posterior:
    """Finds what counts and which rates are likely in turn: each pass uses the last one's fit.

    Args:
        t: updates, (..., n).
        y: losses, (..., n), at most 1, 0 where not seen.
        seen: (..., n).
    """
    low = torch.full_like(y[..., :1], math.log(SLOWEST / (y.shape[-1] - 1)))
    high = torch.full_like(low, math.log(FASTEST))
    share = torch.linspace(0.0, 1.0, NUM_RATES, dtype=y.dtype, device=y.device)
    weights = seen.to(y.dtype)
    for index in range(ROBUST_PASSES + ZOOM_PASSES):
        posterior = _posterior(t, y, weights, low + (high - low) * share)
        residuals = y - _curve(posterior, t)
        weights = _weights(residuals, seen)
        if index >= ROBUST_PASSES:
            low, high = _likely_rates(posterior)
    weights = weights * _independent_share(weights * residuals, seen)
    return _posterior(t, y, weights, low + (high - low) * share, hold_rise=True)


def _posterior(
    t: Tensor, y: Tensor, weights: Tensor, log_rate: Tensor, hold_rise: bool = False
) -> _Posterior:
    """Returns the posterior on a grid of rates, (..., rates).

    Given b and a, N updates and Q(a) = sum of squares, with the noise integrated out: a has the
    density Q^(-(N-1)/2), and m is nearly normal with variance Q / (N-1) / N, cut off at c = 0.

    Args:
        hold_rise: counts a < 0 as the constant a u(n-1) + c.
    """
    u = torch.exp(-log_rate.exp().unsqueeze(-1) * t.unsqueeze(-2))  # (..., rates, n)
    total = weights.sum(-1, keepdim=True)
    freedom = (total - 1.0).clamp(min=1.0)
    mean_y = (weights * y).sum(-1, keepdim=True) / total
    mean_u = (u @ weights.unsqueeze(-1)).squeeze(-1) / total
    offset_u, offset_y = u - mean_u.unsqueeze(-1), y - mean_y
    weighted_u = offset_u * weights.unsqueeze(-2)
    suu = (weighted_u * offset_u).sum(-1).clamp(min=TINY)
    best = (weighted_u @ offset_y.unsqueeze(-1)).squeeze(-1) / suu
    residuals = offset_y.unsqueeze(-2) - best.unsqueeze(-1) * offset_u
    rss = (residuals.square() @ weights.unsqueeze(-1)).squeeze(-1) + total * ROUNDING**2

    # No gain, up or down, exceeds twice the largest loss; c >= 0 ends them earlier, or blurs.
    largest = 2.0 * y.masked_fill(weights == 0.0, 0.0).amax(-1, keepdim=True)
    most = torch.minimum(mean_y.clamp(min=0.0) / mean_u.clamp(min=TINY), largest)
    nearest = torch.maximum(torch.minimum(best, most), -largest)
    sigma = ((rss + suu * (nearest - best).square()) / freedom).sqrt()
    blur = REACH * sigma / total.sqrt() / mean_u.clamp(min=TINY)
    reach = torch.hypot(nearest - best, REACH * sigma / suu.sqrt())
    lower = torch.maximum(best - reach, -largest)
    upper = torch.maximum(torch.minimum(best + reach, torch.minimum(most + blur, largest)), lower)
    width = ((upper - lower) / NUM_GAINS).clamp(min=TINY).unsqueeze(-1)
    middles = torch.arange(NUM_GAINS, dtype=y.dtype, device=y.device) + 0.5
    gains = lower.unsqueeze(-1) + width * middles  # (..., rates, gains)

    squares = rss.unsqueeze(-1) + suu.unsqueeze(-1) * (gains - best.unsqueeze(-1)).square()
    sigma = (squares / (freedom * total).unsqueeze(-1)).sqrt()
    lowest = gains * mean_u.unsqueeze(-1) - mean_y.unsqueeze(-1)  # m - mean_y where c = 0
    log_mass, levels, level_variances = _normal_above(lowest / sigma)
    log_weights = log_mass + width.log() - 0.5 * freedom.unsqueeze(-1) * squares.log()
    student = (freedom / (freedom - 2.0).clamp(min=1.0)).unsqueeze(-1)
    levels, level_variances = sigma * levels, student * sigma.square() * level_variances
    if hold_rise:
        levels = levels + gains.clamp(max=0.0) * offset_u[..., -1:]
        gains = gains.clamp(min=0.0)
    return _moments(log_rate, mean_u, mean_y, log_weights, gains, levels, level_variances)


def _normal_above(lowest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log mass, mean and variance of a standard normal variable above `lowest`."""
    hazard = math.sqrt(2.0 / math.pi) / torch.special.erfcx(lowest * math.sqrt(0.5))
    variance = (1.0 - hazard * (hazard - lowest)).clamp(min=0.0, max=1.0)
    return torch.special.log_ndtr(-lowest), hazard, variance


def _moments(
    log_rate: Tensor,
    mean_u: Tensor,
    mean_y: Tensor,
    log_weights: Tensor,
    gains: Tensor,
    levels: Tensor,
    level_variances: Tensor,
) -> _Posterior:
    """Sums over the gains, (..., rates, gains) to (..., rates); `levels` are m - mean_y."""
    weight = torch.softmax(torch.logsumexp(log_weights, -1), -1)
    share = torch.softmax(log_weights, -1)
    gain, level = (share * gains).sum(-1), (share * levels).sum(-1)
    gain_offset, level_offset = gains - gain.unsqueeze(-1), levels - level.unsqueeze(-1)
    return _Posterior(
        log_rate=log_rate,
        weight=weight,
        mean_u=mean_u,
        gain=gain,
        level=mean_y + level,
        gain_variance=(share * gain_offset.square()).sum(-1),
        level_variance=(share * (level_offset.square() + level_variances)).sum(-1),
        covariance=(share * gain_offset * level_offset).sum(-1),
    )


def _predict(posterior: _Posterior, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and std of the loss without its noise at t, (..., 1) each."""
    weight, log_rate = posterior.weight, posterior.log_rate
    u = torch.exp(-log_rate.exp() * t) - posterior.mean_u
    means = posterior.level + posterior.gain * u
    variances = posterior.level_variance + 2.0 * u * posterior.covariance
    variances = (variances + u.square() * posterior.gain_variance).clamp(min=0.0)
    mean = (weight * means).sum(-1, keepdim=True)
    variance = (weight * (variances + (means - mean).square())).sum(-1, keepdim=True)
    return mean.clamp(min=0.0), variance.sqrt()


def _curve(posterior: _Posterior, t: Tensor) -> Tensor:
    """Returns the mean of the loss at each t, (..., n)."""
    u = torch.exp(-posterior.log_rate.exp().unsqueeze(-1) * t.unsqueeze(-2))
    floor = posterior.level - posterior.gain * posterior.mean_u
    falling = (posterior.weight * posterior.gain).unsqueeze(-2) @ u
    return falling.squeeze(-2) + (posterior.weight * floor).sum(-1, keepdim=True)


def _weights(residuals: Tensor, seen: Tensor) -> Tensor:
    """Returns Tukey's biweight, 1 at no residual to 0 at `CUTOFF` standard deviations, (..., n).

    The median of the residuals tells their standard deviation, here as if 3 of n were fitted away.
    """
    count = seen.sum(-1, keepdim=True)
    ordered = residuals.abs().masked_fill(~seen, math.inf).sort(-1).values
    median = ordered.gather(-1, ((count - 1) // 2).clamp(min=0))
    sigma = 1.4826 * median * count / (count - 3).clamp(min=1) + ROUNDING
    z = (residuals / (CUTOFF * sigma)).abs().clamp(max=1.0)
    return (1.0 - z.square()).square().masked_fill(~seen, 0.0)


def _independent_share(residuals: Tensor, seen: Tensor) -> Tensor:
    """Returns how many independent residuals tell as much, as a share of the number, (..., 1).

    That is (1 - r) / (1 + r) with neighbours correlated by r; chance alone gives 1 / sqrt(n).
    """
    squares = residuals.square().sum(-1, keepdim=True) + ROUNDING**2
    products = (residuals[..., 1:] * residuals[..., :-1]).sum(-1, keepdim=True)
    chance = seen.sum(-1, keepdim=True).clamp(min=1).rsqrt()
    correlation = (products / squares - chance).clamp(0.0, MAX_CORRELATION)
    return (1.0 - correlation) / (1.0 + correlation)


def _likely_rates(posterior: _Posterior) -> tuple[Tensor, Tensor]:
    """Returns the ends of the log rates that are not negligible, and a step more, (..., 1) each."""
    log_rate, weight = posterior.log_rate, posterior.weight
    step = log_rate[..., 1:2] - log_rate[..., :1]
    is_likely = weight >= math.exp(-NEGLIGIBLE) * weight.amax(-1, keepdim=True)
    low = log_rate.masked_fill(~is_likely, math.inf).amin(-1, keepdim=True) - step
    high = log_rate.masked_fill(~is_likely, -math.inf).amax(-1, keepdim=True) + step
    return torch.maximum(low, log_rate[..., :1]), torch.minimum(high, log_rate[..., -1:])


def _check(losses: Tensor, horizon: float | Tensor) -> tuple[Tensor, Tensor]:
    """Returns both in float64; raises ValueError if they cannot be used."""
    n = losses.shape[-1] if losses.dim() > 0 else 0
    if n < MIN_POINTS:
        raise ValueError(
            f"losses must have at least {MIN_POINTS} entries in the last dimension, got shape "
            f"{tuple(losses.shape)}: record more updates"
        )
    if not isinstance(horizon, Tensor):
        if not horizon >= 0:
            raise ValueError(f"horizon must be an update number, 0 or more, got {horizon}")
        # Filled on the device: a copy from the host would wait, and fail in a graph capture.
        horizon = torch.full((), float(horizon), dtype=torch.float64, device=losses.device)
    if horizon.device != losses.device:
        raise ValueError(
            f"horizon is on {horizon.device}, losses on {losses.device}: move it with .to()"
        )
    try:
        torch.broadcast_shapes(losses.shape[:-1], horizon.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"horizon {tuple(horizon.shape)} must broadcast with the dimensions before the last "
            f"of losses {tuple(losses.shape)}: insert 1 where one serves a whole batch"
        ) from None
    return losses.detach().to(torch.float64), horizon.detach().to(torch.float64)
