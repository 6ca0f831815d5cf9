"""What counts as a divergence in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrs_ext.autolrs.search import FAR

QUARTER = 4  # of the losses since a look, the last ones are judged,
LEAST = 3  # but no fewer than so many, or else half of them
NOISE_STDS = 2.0  # that the loss before the stage may have been underestimated by


def noise_std(losses: Tensor) -> Tensor:
    """Returns how much losses (n,) differ from batch to batch, 0-d, 0 if one is not finite."""
    std = losses.std(correction=0)
    return torch.where(std.isfinite(), std, 0.0)


def good_level(before: Tensor, losses: Tensor, was_bad: Tensor) -> Tensor:
    """Returns the training loss with the last good state, 0-d.

    Args:
        before: of the updates between the last two looks, (m,).
        losses: of the updates since the last look, (n,), the first one made with that state.
        was_bad: whether training was rolled back at the last look, bool, 0-d.
    """
    quarter = max(len(losses) // QUARTER, 1)
    return torch.where(was_bad, losses[:quarter].amin(), _last_level(before))


def has_diverged(
    losses: Tensor,
    start: Tensor,
    std: Tensor,
    level: Tensor,
    params: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Returns whether training has left the rails, bool, 0-d, without a sync.

    It has if a loss is not finite, or an entry of a parameter that was, or if the median of the
    last quarter of the losses, which a spike leaves alone, is above twice the loss before the
    stage, with an allowance for noise. Where the task itself becomes harder, what was good at the
    last look counts instead.

    Args:
        losses: of the updates since the last look, (n,).
        start, std: the training loss before the stage, as `losses` are, and its standard deviation
            from batch to batch, 0-d, of which no more than `start` is noise: the trial that it is
            measured in may have diverged. Where `start` is not positive, only what is not finite
            counts.
        level: see `good_level`, 0-d.
        params: what this rank has of each, which may be nothing, and the last good copy of it, on
            any device. What is not finite there, such as a mask of -inf, is meant to be so.
    """
    harder = (level / start).nan_to_num(nan=1.0).clamp(min=1.0)
    allowance = NOISE_STDS * std.minimum(start)
    limit = torch.where(start > 0.0, FAR * (start + allowance) * harder, torch.inf)
    is_bad = ~losses.isfinite().all() | (_last_level(losses) > limit)
    are_good = [_stays_finite(param, copy).to(losses.device) for param, copy in params]
    return is_bad | ~torch.stack(are_good).all() if are_good else is_bad


def rolled_back(begin: int, end: int) -> str:
    """Returns what to tell of a divergence."""
    return (
        f"training has diverged in updates {begin + 1} to {end}, which are undone: losses or "
        f"weights were not finite, or losses above {FAR:g} times those before the search (or since "
        "the task became harder). It goes on at half the learning rate"
    )


def _last_level(losses: Tensor) -> Tensor:
    count = max(len(losses) // QUARTER, min(len(losses) // 2, LEAST), 1)
    return losses[-count:].median()


def _stays_finite(param: Tensor, copy: Tensor) -> Tensor:
    copy = copy.to(param.device, non_blocking=True)
    return (param.isfinite() | ~copy.isfinite()).all()
