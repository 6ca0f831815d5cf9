"""The schedules as a `torch.optim.lr_scheduler.LRScheduler`, for optimizers that know none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lrs_ext.drivers import check_num_groups
from lrs_ext.learning_rates import at_height_of
from lrs_ext.schedules import Schedule
from lrs_ext.tensor_checks import number


class ScheduleLR(LRScheduler):
    """Sets the learning rates of any optimizer of torch from a schedule.

    Like all schedulers of torch it is stepped after each `optimizer.step()`, and it takes the
    heights from the optimizer: a single schedule runs in each group scaled to the group's own
    learning rate, ``schedule.scaled(base_lr / schedule.lr)``, times its ``lr_scale`` if it has one,
    as timm gives it to layers. The schedules of a list, one a group, run as they are. Optimizers of
    `lrs_ext` take a schedule as their ``lr`` and need none of this.

    Args:
        optimizer: the one to drive. A tensor as a learning rate is filled in place.
        schedule: one for all groups, or a list with one for each.
        last_epoch: the step to go on from, as in torch; -1 begins.

    Raises:
        TypeError, ValueError: `schedule` is neither, has a height of 0, or the list does not fit.

    Warns:
        UserWarning: the height of a single schedule, unless 1, is that of no group.

    >>> import lrs_ext
    >>> opt = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.4)
    >>> scheduler = ScheduleLR(opt, lrs_ext.linear(0.4, total_steps=4))
    >>> for _ in range(2):
    ...     _ = opt.step(), scheduler.step()
    >>> scheduler.get_last_lr()
    [0.2]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | Sequence[Schedule],
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        base_lrs = [
            float(number(group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups
        ]
        schedules = _schedules(schedule, base_lrs)
        if isinstance(schedule, Schedule):
            schedules = list(map(at_height_of, optimizer.param_groups, schedules))
        self.schedules = schedules
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Returns the learning rate of each group at the present step, as Python floats."""
        check_num_groups(self.optimizer.param_groups, len(self.schedules), "ScheduleLR")
        return [schedule(max(self.last_epoch, 0)) for schedule in self.schedules]

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns what `step` has set last, as Python floats."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and, to compare with, the schedules: plain numbers and strings."""
        # Equal ones are one object, which `torch.save` writes once.
        described = {schedule: schedule.to_dict() for schedule in set(self.schedules)}
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "in_charge": self._is_in_charge(),
            "schedules": [described[schedule] for schedule in self.schedules],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved position, with the schedules that this object was made with.

        The learning rates of the optimizer follow at once. A run that is resumed with a longer
        budget makes its `ScheduleLR` with the longer schedule, and loads the optimizer first: its
        checkpoint has the learning rates of the shorter one.
        """
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        if state_dict["in_charge"]:
            self._put()

    def _put(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _is_in_charge(self) -> bool:
        """Whether the optimizer has what was set here: a SequentialLR may have moved on."""
        pairs = zip(self.optimizer.param_groups, self.get_lr(), strict=True)
        return all(_is_close(number(group["lr"]), float(lr)) for group, lr in pairs)


def _schedules(schedule: Schedule | Sequence[Schedule], base_lrs: list[float]) -> list[Schedule]:
    if not isinstance(schedule, Schedule):
        is_list = isinstance(schedule, Sequence) and not isinstance(schedule, str)
        schedules: list[Any] = list(schedule) if is_list else [schedule]
        for index, entry in enumerate(schedules):
            if not isinstance(entry, Schedule):
                raise TypeError(f"schedule must be a Schedule, got {entry!r} for group {index}")
        if len(schedules) != len(base_lrs):
            raise ValueError(f"expected {len(base_lrs)} schedules, got {len(schedules)}")
        return schedules
    if not schedule.lr > 0.0:
        raise ValueError(f"schedule must have a positive lr, of which it is a shape: {schedule!r}")
    are_same = [_is_close(lr, schedule.lr) for lr in base_lrs]
    if schedule.lr != 1.0 and not any(are_same):
        warnings.warn(
            f"the optimizer's learning rates {base_lrs} set the heights, not that of {schedule!r}: "
            "give the optimizer the lr of the schedule, or pass a list of schedules",
            stacklevel=3,
        )
    return [
        schedule if is_same else schedule.scaled(lr / schedule.lr)
        for lr, is_same in zip(base_lrs, are_same, strict=True)
    ]


def _is_close(a: float, b: float) -> bool:
    """Whether two learning rates are the same but for rounding to float32."""
    return math.isclose(a, b, rel_tol=1e-6)
