"""What AutoLRS refuses to take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lrs_ext.number_checks import checked_number
from lrs_ext.shards import is_dtensor

RATIO_TOLERANCE = 1e-5  # relative: a learning rate that was saved in float32 has been rounded


def check_loss(loss: Tensor, what: str) -> None:
    """Raises TypeError or ValueError if `loss` is no floating 0-d tensor of this rank's own."""
    if not isinstance(loss, Tensor):
        way_out = ": compute and return it" if loss is None else ": leave out .item()"
        raise TypeError(
            f"{what} must be a tensor, which nobody waits for, got {type(loss).__name__}{way_out}"
        )
    if is_dtensor(loss):
        raise TypeError(
            f"{what} must be a plain tensor, got a DTensor with placements {loss.placements}: pass "
            "its .full_tensor()"
        )
    if loss.dim() != 0 or not loss.is_floating_point():
        way_out = "take its mean" if loss.is_floating_point() else "convert it by .float()"
        raise ValueError(
            f"{what} must be a 0-d floating tensor, got {loss.dtype} of shape "
            f"{tuple(loss.shape)}: {way_out}"
        )


def check_tensors(**tensors: Tensor) -> None:
    """Raises TypeError if one of the arguments of a function is no tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"{name} must be a tensor, got {kind}: torch.as_tensor makes one")


def check_model(model: nn.Module) -> None:
    """Raises TypeError if `model` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the second argument must be the model, a torch.nn.Module, got {type(model).__name__}"
        )


def check_val_loss(val_loss: Callable[[], Tensor] | None) -> None:
    """Raises TypeError if `val_loss` is neither None nor a function."""
    if val_loss is not None and not callable(val_loss):
        raise TypeError(
            f"val_loss must be a function without arguments that returns a loss, got {val_loss!r}"
        )


def checked_extras(extra_state: Iterable[Any]) -> tuple[Any, ...]:
    """Returns `extra_state` as a tuple.

    Raises:
        TypeError: it cannot be iterated: an object where a list of objects belongs.
    """
    if not isinstance(extra_state, Iterable):
        name = type(extra_state).__name__
        way_out = "leave it out" if extra_state is None else "pass [it]"
        raise TypeError(f"extra_state must be a sequence of objects, got {name}: {way_out}")
    return tuple(extra_state)


def check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError if `state` is that of something else."""
    if "plan" not in state:
        raise ValueError(f"not what AutoLRS.state_dict() has returned: the keys are {list(state)}")


def check_plan(saved: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raises ValueError if a checkpoint's plan is not that of this run, as far as it is known."""
    for name, value in plan.items():
        before = saved.get(name)
        if not (_same_ratios(before, value) if name == "ratios" else before == value):
            raise ValueError(
                f"the checkpoint was saved with {name}={before}, this AutoLRS has "
                f"{value}: make it with the arguments of the run that is continued"
            )


def _same_ratios(saved: Any, ratios: list[float]) -> bool:
    """Returns whether `ratios` of `group_ratios` are those of a checkpoint; 0 is any."""
    return len(saved) == len(ratios) and all(
        ratio == 0.0 or math.isclose(before, ratio, rel_tol=RATIO_TOLERANCE)
        for before, ratio in zip(saved, ratios, strict=True)
    )


def checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Returns the bounds as floats.

    Raises:
        TypeError: they are no two numbers.
        ValueError: not 0 < low < high < inf.
    """
    try:
        first, second = bounds
    except (TypeError, ValueError):
        raise TypeError(f"lr_bounds must be two numbers (low, high), got {bounds!r}") from None
    low, high = checked_number("lr_bounds[0]", first), checked_number("lr_bounds[1]", second)
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"lr_bounds must be 0 < low < high < inf, got {(low, high)}")
    return low, high
