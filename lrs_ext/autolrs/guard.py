"""What counts as a divergence in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrs_ext.autolrs.search import tail_mean

BLOW_UP = 2.0  # times the loss before the stage


def has_diverged(losses: Tensor, start: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Returns whether training has left the rails, bool, 0-d, without a sync.

    It has if a loss or a parameter is not finite, or if the last quarter of the losses is above
    twice the loss before the stage.

    Args:
        losses: of the updates since the last look, (n,).
        start: the loss before the stage, 0-d; where it is not positive, only what is not finite
            counts.
    """
    tail = tail_mean(losses)
    limit = torch.where(start > 0.0, BLOW_UP * start, torch.inf)
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(params), torch.inf)])
    return ~tail.isfinite() | (tail > limit) | ~norms.isfinite().all()
