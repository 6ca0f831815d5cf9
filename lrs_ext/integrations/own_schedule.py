"""A scheduler of torch for loops that insist on one, where the optimizer has its own schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.wrappers import unwrapped


class OwnSchedule(LRScheduler):
    """Leaves an optimizer of `lrs_ext` the schedule that it has, and shows it to a training loop.

    A scheduler of torch writes ``group["lr"]``, which takes over from the optimizer's schedule.
    This one writes nothing. `get_last_lr` returns what the groups had at the last `step`: between
    ``optimizer.step()`` and ``scheduler.step()`` what the update has used, as with any scheduler of
    torch. Floats stay floats: nobody waits for the device.

    Args:
        optimizer: one of `lrs_ext`, or a framework's wrapper around it.

    Raises:
        TypeError: it is another optimizer, which has no schedule.

    >>> import lrs_ext
    >>> param = torch.nn.Parameter(torch.zeros(2))
    >>> opt = lrs_ext.SGD([param], lr=lrs_ext.linear(0.4, total_steps=4))
    >>> scheduler = OwnSchedule(opt)
    >>> for _ in range(2):
    ...     param.grad = torch.ones(2)
    ...     _ = opt.step(), scheduler.step()
    >>> scheduler.get_last_lr()
    [0.2]
    """

    writes_learning_rates = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # The base's constructor would put "initial_lr" into the groups and wrap the optimizer's
        # step: both are for schedulers that set learning rates.
        if not isinstance(unwrapped(optimizer), ScheduledOptimizer):
            raise TypeError(
                f"OwnSchedule is for an optimizer of lrs_ext, got {type(optimizer).__name__}: "
                "drive others with lrs_ext.ScheduleLR"
            )
        self.optimizer = optimizer
        self.last_epoch, self._step_count = 0, 1
        self._last_lr = self.get_lr()
        self.base_lrs = self.get_lr()

    def get_lr(self) -> list[float | Tensor]:
        """Returns what each group has now."""
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns what each group had at the last `step`."""
        return list(self._last_lr)

    def step(self, epoch: int | None = None) -> None:
        """Notes that an update is over; the optimizer has advanced its schedule itself."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1
        self._last_lr = self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers; the schedule and its position are in the optimizer's state."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "last_lr": self.get_last_lr(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting and showing from a saved position."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self._last_lr = list(state_dict["last_lr"])
