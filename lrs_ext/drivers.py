"""Who writes an optimizer's learning rates: one at most, and for the groups that it knows."""

from __future__ import annotations

import weakref
from collections.abc import Sized

import torch

_drivers: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[object]] = (
    weakref.WeakKeyDictionary()
)


def driver_of(optimizer: torch.optim.Optimizer) -> object | None:
    """Returns what drives the optimizer, if it is still there."""
    reference = _drivers.get(optimizer)
    return None if reference is None else reference()


def check_free(optimizer: torch.optim.Optimizer) -> None:
    """Raises RuntimeError if something else that is still there drives the optimizer."""
    driver = driver_of(optimizer)
    if driver is not None:
        name = type(driver).__name__
        article = "an" if name[0] in "AEIOU" else "a"
        raise RuntimeError(
            f"the optimizer has {article} {name} already: use that one, or delete it first"
        )


def check_num_groups(groups: Sized, known: int, driver: str) -> None:
    """Raises RuntimeError if there are other groups than those `known` when `driver` was made."""
    if len(groups) != known:
        raise RuntimeError(
            f"the optimizer has {len(groups)} parameter groups, it had {known} when {driver} was "
            f"made: make {driver} after add_param_group"
        )


def register(optimizer: torch.optim.Optimizer, driver: object) -> None:
    """Notes that `driver` drives the optimizer, for as long as it lives."""
    _drivers[optimizer] = weakref.ref(driver)
