"""What AutoLRS refuses to take."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def check_loss(loss: Tensor, what: str) -> None:
    """Raises TypeError or ValueError if `loss` is no floating 0-d tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{what} must be a tensor, which nobody waits for, got {type(loss).__name__}: "
            "leave out .item()"
        )
    if loss.dim() != 0 or not loss.is_floating_point():
        raise ValueError(
            f"{what} must be a 0-d floating tensor, got {loss.dtype} of shape "
            f"{tuple(loss.shape)}: take its mean"
        )


def check_plan(saved: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raises ValueError if a checkpoint's plan is not that of this run."""
    for name, value in plan.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the checkpoint was saved with {name}={saved.get(name)}, this AutoLRS has "
                f"{value}: make it with the arguments of the run that is continued"
            )


def checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Returns the bounds as floats.

    Raises:
        TypeError: they are no two numbers.
        ValueError: not 0 < low < high < inf.
    """
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise TypeError(f"lr_bounds must be two numbers (low, high), got {bounds!r}") from None
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"lr_bounds must be 0 < low < high < inf, got {(low, high)}")
    return low, high
