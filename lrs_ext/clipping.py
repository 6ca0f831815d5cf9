"""The limit of a norm, which the next step applies to its gradients on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.number_checks import checked_number
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.step_hooks import uncompiled
from lrs_ext.wrappers import unwrapped


@uncompiled
def clip_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float | Tensor) -> Tensor:
    """Limits the norm of all gradients in the optimizer's next step, without waiting for it.

    The 2-norm is taken in one pass over the gradients. They are not written: the step multiplies
    them by ``min(1, max_norm / (norm + 1e-6))`` on the way. A loss scale that a `GradScaler` undoes
    in the step counts: the limit holds for the unscaled gradients.

    Args:
        optimizer: one of `lrs_ext`, or a framework's wrapper around it; all of its parameters are
            taken together.
        max_norm: a positive float, or a one-element tensor, which replays of a CUDA graph read.

    Returns:
        The norm of the gradients as they are stored, before clipping: float32, 0-d, on the device
        of the first parameter. With parameters on the CPU too, the host waits for the norm.
        As in torch, a norm that is not finite makes the step's result so too.

    Raises:
        TypeError: the optimizer is none of `lrs_ext`, or `max_norm` is no number.
        ValueError: `max_norm` is not positive, or has several elements.

    >>> import torch, lrs_ext
    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> opt = lrs_ext.SGD([p], lr=1.0)
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> lrs_ext.clip_grad_norm_(opt, max_norm=1.0)
    tensor(5.)
    >>> opt.step()
    >>> [round(x, 4) for x in p.tolist()], p.grad.tolist()
    ([-0.6, -0.8], [3.0, 4.0])
    """
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, ScheduledOptimizer):
        raise TypeError(
            f"clip_grad_norm_ takes an optimizer of lrs_ext, got {type(optimizer).__name__}: use "
            "torch.nn.utils.clip_grad_norm_ for parameters, or for other optimizers"
        )
    if isinstance(max_norm, Tensor):
        if max_norm.numel() != 1:
            raise ValueError(f"max_norm must have one element, got shape {tuple(max_norm.shape)}")
        value = ops.host_value(max_norm)  # None on a device, for which nobody waits
    else:
        value = max_norm = checked_number("max_norm", max_norm)
    if value is not None and not value > 0.0:
        raise ValueError(f"max_norm must be positive, got {value}")
    return optimizer.clip_(max_norm)
