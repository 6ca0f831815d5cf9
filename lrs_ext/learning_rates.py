"""The two sides of a group's learning rate: ``group["lr"]`` on the host, a row on the device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.buffer import ScheduleBuffer, capacity_for
from lrs_ext.schedules import Schedule, checked_learning_rate

Group = dict[str, Any]


@dataclass
class _Source:
    """Where one group's learning rate comes from."""

    schedule: Schedule | None = None
    scheduled: float | None = None  # the very float that the schedule last put into group["lr"]
    seen: float | Tensor | None = None  # what group["lr"] held when its row was last written
    zeroed: bool = False  # that was a zero, as far as the host can tell without a sync


class LearningRates:
    """Keeps each ``group["lr"]`` and its row of the schedule buffer in step, without a sync.

    A group with a `Schedule` shows on the host, as a float, what the next update will use. Any
    other float put there takes over from the next update. The very float that was found there hands
    control back: saving and restoring ``group["lr"]``, as distributed checkpoints do, changes
    nothing. A tensor is read by the kernels where it is.

    Args:
        groups: the optimizer's parameter groups; a `Schedule` in ``group["lr"]`` is replaced by its
            value at `step`.
        device: where the parameters are.
        step: committed updates so far.
    """

    def __init__(self, groups: list[Group], device: torch.device, step: int = 0) -> None:
        self.step = step
        self._sources = [_Source() for _ in groups]
        for index, group in enumerate(groups):
            if isinstance(group["lr"], Schedule):
                self._sources[index].schedule = group["lr"]
            elif isinstance(group["lr"], Tensor):
                group["lr"] = _own_tensor(group["lr"], groups[:index], device)
        self.buffer = ScheduleBuffer(len(groups), self._capacity(), device)
        self.buffer.step.fill_(step)
        for index, group in enumerate(groups):
            if self._sources[index].schedule is not None:
                self._resume(index, group)
            else:
                self.sync(index, group)

    def sync(self, index: int, group: Group) -> bool:
        """Writes what the host put into ``group["lr"]`` to the device, if it is new.

        Returns:
            True if `row` has changed its address.

        Raises:
            ValueError: it is not a finite number >= 0, or a tensor of more than one element.
        """
        source = self._sources[index]
        lr = group["lr"]
        if lr is source.seen:
            return False
        if isinstance(lr, Schedule):
            return self._attach(index, group, lr)
        if lr is source.scheduled:
            self._resume(index, group)
        elif isinstance(lr, Tensor):
            group["lr"] = _own_tensor(lr, [], self.buffer.values.device)
            source.zeroed = lr.device.type == "cpu" and float(lr) == 0.0
        else:
            self.buffer.values[index].fill_(checked_learning_rate(lr))
            source.zeroed = lr == 0.0
        moved = isinstance(group["lr"], Tensor) or isinstance(source.seen, Tensor)
        source.seen = group["lr"]
        return moved

    def row(self, index: int) -> Tensor:
        """Returns what the kernels read: one value a step, of which the last one holds."""
        seen = self._sources[index].seen
        return seen.detach().view(1) if isinstance(seen, Tensor) else self.buffer.values[index]

    def current(self, index: int) -> Tensor:
        """Returns the 0-d value that the next update of the group uses, without a sync."""
        seen = self._sources[index].seen
        return seen.detach().view(()) if isinstance(seen, Tensor) else self.buffer.current(index)

    def advance(self, groups: list[Group]) -> None:
        """Follows a committed update on the host."""
        self.step += 1
        for source, group in zip(self._sources, groups, strict=True):
            if source.schedule is not None and group["lr"] is source.scheduled:
                lr = ops.native_schedule(source.schedule).value(self.step)
                group["lr"] = source.scheduled = source.seen = lr

    def schedule(self, index: int) -> Schedule | None:
        """Returns the schedule that is in charge of the group, if any."""
        source = self._sources[index]
        in_charge = source.schedule is not None and source.seen is source.scheduled
        return source.schedule if in_charge else None

    def save(self, index: int, saved_group: Group) -> None:
        """Adds to a group of a checkpoint what it takes to resume."""
        schedule = self.schedule(index)
        saved_group["lr"] = float(saved_group["lr"])
        saved_group["schedule"] = None if schedule is None else json.dumps(schedule.to_dict())
        saved_group["schedule_step"] = self.step

    def load(self, saved_groups: list[Group], step: int) -> LearningRates:
        """Takes over the groups of a checkpoint, in the present buffer if it is long enough.

        A group without the key "schedule" comes from another optimizer: its float is kept only
        where no schedule is in charge here.
        """
        for index, group in enumerate(saved_groups):
            source = self._sources[index]
            schedule = self.schedule(index)
            if "schedule" in group:
                saved = group.pop("schedule")
                schedule = None if saved is None else Schedule.from_dict(json.loads(saved))
            group.pop("schedule_step", None)
            if schedule is not None:
                group["lr"] = schedule
            elif isinstance(source.seen, Tensor):
                group["lr"] = source.seen.fill_(checked_learning_rate(group["lr"]))
        capacity = max(
            (capacity_for(g["lr"]) for g in saved_groups if isinstance(g["lr"], Schedule)),
            default=1,
        )
        if capacity > self.buffer.capacity:
            return LearningRates(saved_groups, self.buffer.values.device, step)
        self.step = step
        self.buffer.step.fill_(step)
        for index, group in enumerate(saved_groups):
            self._sources[index] = _Source()
            self.sync(index, group)
        return self

    def rebuilt(self, groups: list[Group], device: torch.device) -> LearningRates:
        """Returns the same learning rates in a new buffer, for more groups or another device."""
        for index in range(len(self._sources)):
            schedule = self.schedule(index)
            if schedule is not None and groups[index]["lr"] is self._sources[index].seen:
                groups[index]["lr"] = schedule
        return LearningRates(groups, device, self.step)

    @property
    def all_zero(self) -> bool:
        """Whether the host has set every learning rate to zero."""
        return all(source.zeroed for source in self._sources)

    def _capacity(self) -> int:
        schedules = [source.schedule for source in self._sources]
        return max((capacity_for(s) for s in schedules if s is not None), default=1)

    def _attach(self, index: int, group: Group, schedule: Schedule) -> bool:
        if capacity_for(schedule) > self.buffer.capacity:
            raise ValueError(
                f"a schedule of total_steps={schedule.total_steps} does not fit into the schedule "
                f"buffer of {self.buffer.capacity} values, whose address is fixed: give it to the "
                "optimizer's constructor"
            )
        moved = isinstance(self._sources[index].seen, Tensor)
        self._sources[index].schedule = schedule
        self._resume(index, group)
        return moved

    def _resume(self, index: int, group: Group) -> None:
        source = self._sources[index]
        assert source.schedule is not None
        self.buffer.fill_(index, source.schedule)
        source.zeroed = False
        group["lr"] = source.scheduled = source.seen = source.schedule(self.step)


def _own_tensor(lr: Tensor, others: list[Group], device: torch.device) -> Tensor:
    """Returns `lr` as the kernels read it; the same tensor unless its type or another group's hold
    on it forbids that."""
    if lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    own = lr.to(device=device, dtype=torch.float32)
    return own.clone() if any(group["lr"] is own for group in others) else own
