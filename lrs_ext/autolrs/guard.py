"""What counts as a divergence in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrs_ext.autolrs.search import FAR, tail_mean

TAIL_PERCENT = 50  # of the losses since the last look, the last ones
NOISE_STDS = 2.0  # that the loss before the stage may have been underestimated by


def noise_std(losses: Tensor) -> Tensor:
    """Returns how much losses (n,) differ from batch to batch, 0-d, 0 if one is not finite."""
    std = losses.std(correction=0)
    return torch.where(std.isfinite(), std, 0.0)


def has_diverged(
    losses: Tensor, start: Tensor, std: Tensor, params: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Returns whether training has left the rails, bool, 0-d, without a sync.

    It has if a loss is not finite, or an entry of a parameter that was, or if the last half of the
    losses is above twice the loss before the stage, with an allowance for noise.

    Args:
        losses: of the updates since the last look, (n,).
        start, std: the training loss before the stage, as `losses` are, and its standard deviation
            from batch to batch, 0-d; where the former is not positive, only what is not finite
            counts.
        params: what this rank has of each, which may be nothing, and the last good copy of it, on
            any device. What is not finite there, such as a mask of -inf, is meant to be so.
    """
    tail = tail_mean(losses, TAIL_PERCENT)
    limit = torch.where(start > 0.0, FAR * (start + NOISE_STDS * std), torch.inf)
    is_bad = ~tail.isfinite() | (tail > limit)
    are_good = [_stays_finite(param, copy).to(losses.device) for param, copy in params]
    return is_bad | ~torch.stack(are_good).all() if are_good else is_bad


def _stays_finite(param: Tensor, copy: Tensor) -> Tensor:
    copy = copy.to(param.device, non_blocking=True)
    return (param.isfinite() | ~copy.isfinite()).all()
