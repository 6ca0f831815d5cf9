"""A scheduler of torch beside AutoLRS, which would take its learning rates over unnoticed."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from lrs_ext.autolrs.rates import Rates
from lrs_ext.wrappers import unwrapped


class SchedulerWatch:
    """Tells what a scheduler puts into ``group["lr"]`` from what a user puts there on purpose."""

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Rates) -> None:
        self._optimizer, self._rates = optimizer, rates
        self._known: set[int] = set()  # the groups that others have written, with no scheduler

    def check(self) -> None:
        """Checks that no scheduler has written a learning rate since the last `check`.

        Whose it is, is only looked for in groups that nobody else had written before: that takes
        as long as a full garbage collection.

        Raises:
            RuntimeError: one has.
        """
        written = self._rates.written_by_others()
        for index in sorted(written - self._known):
            scheduler = _writer(self._optimizer, index)
            if scheduler is not None:
                raise RuntimeError(
                    f"{type(scheduler).__name__} has written the learning rate of group {index}, "
                    "which takes it over from AutoLRS: leave out the scheduler; AutoLRS has a "
                    "warm-up and a schedule of its own (warmup_steps, schedule)"
                )
        self._known = written


def _writer(optimizer: torch.optim.Optimizer, index: int) -> LRScheduler | None:
    """Returns the scheduler that has written the learning rate of a group, if one has."""
    lr = float(optimizer.param_groups[index]["lr"])
    for found in gc.get_objects():
        # Not isinstance, which asks proxies for what they stand for.
        if issubclass(type(found), LRScheduler) and _has_written(found, optimizer, index, lr):
            scheduler: LRScheduler = found
            return scheduler
    return None


def _has_written(scheduler: Any, optimizer: torch.optim.Optimizer, index: int, lr: float) -> bool:
    driven = getattr(scheduler, "optimizer", None)
    if not isinstance(driven, torch.optim.Optimizer) or unwrapped(driven) is not optimizer:
        return False
    last = getattr(scheduler, "_last_lr", ())
    is_writer = getattr(scheduler, "writes_learning_rates", True)
    return is_writer and index < len(last) and float(last[index]) == lr
