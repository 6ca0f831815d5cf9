"""The schedule buffer: learning rates in device memory, read by the step kernels."""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor

from lrs_ext.number_checks import checked_count, checked_learning_rate
from lrs_ext.param_devices import on_device
from lrs_ext.schedules import Schedule


class ScheduleBuffer:
    """Learning rates by row and step, with the step that the next update reads.

    An update reads ``values[row, min(step, capacity - 1)]`` and then advances `step`, all on the
    device. Both tensors keep their addresses for the life of the buffer. Those of an optimizer with
    parameters on several devices are twins: `fill_` and `write_` on one write to all.

    Args:
        rows, capacity: the shape of `values`, at least (0, 1); an entry takes 4 bytes.
        device: of both tensors, None is torch's default.

    Raises:
        ValueError: there are fewer rows, or they are shorter.

    Attributes:
        values: float32, shape (rows, capacity). An optimizer has one row per parameter group.
        step: int64, 0-d: committed updates.
        rows: the rows of `values`, float32, shape (capacity,) each.
        schedules: what each row was last filled with, or None; every fill puts a new object here.

    >>> import lrs_ext
    >>> buffer = lrs_ext.ScheduleBuffer(rows=1, capacity=5)
    >>> buffer.fill_(0, lrs_ext.linear(1.0, total_steps=4)).values
    tensor([[1.0000, 0.7500, 0.5000, 0.2500, 0.0000]])
    >>> _ = buffer.step.fill_(3)
    >>> buffer.write_(0, 0.5, steps=1).values
    tensor([[1.0000, 0.7500, 0.5000, 0.5000, 0.0000]])
    """

    def __init__(self, rows: int, capacity: int, device: torch.device | str | None = None) -> None:
        if rows < 0 or capacity < 1:
            raise ValueError(f"a buffer needs rows >= 0 and capacity >= 1, got {rows}, {capacity}")
        self.values = torch.zeros(rows, capacity, dtype=torch.float32, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.rows: list[Tensor] = list(self.values)
        self.schedules: list[Schedule | None] = [None] * rows
        self._places = [(self.values, self.step)]  # of all twins, in which the list is the same

    def twin(self, device: torch.device) -> ScheduleBuffer:
        """Returns a buffer on another device that has, and from now on gets, what this one gets.

        Only `step` advances by itself.
        """
        twin = ScheduleBuffer(len(self.rows), self.capacity, device)
        twin.values.copy_(self.values)
        twin.step.copy_(self.step)
        self._places.append((twin.values, twin.step))
        twin._places, twin.schedules = self._places, self.schedules
        return twin

    @property
    def capacity(self) -> int:
        """The length of a row: updates whose learning rates may differ."""
        return self.values.shape[1]

    def fill_(self, row: int, schedule: Schedule) -> ScheduleBuffer:
        """Writes a schedule into `row` from update 0 on; the rest of the row holds its last value.

        Raises:
            IndexError: there is no such row.
            TypeError: it is no schedule.
            ValueError: the row is too short to hold the schedule and the value after its end.
        """
        self._row(row)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"fill_ takes a Schedule, got {schedule!r}")
        if schedule.capacity > self.capacity:
            raise ValueError(
                f"a schedule of total_steps={schedule.total_steps} needs a capacity of "
                f"{schedule.capacity}, got {self.capacity}: make a larger ScheduleBuffer, or give "
                "the optimizer the schedule with set_schedule"
            )
        for values, _ in self._places:
            schedule.fill_(values[row])
        self.schedules[row] = copy.copy(schedule)
        return self

    def write_(self, row: int, value: Tensor | float, steps: int) -> ScheduleBuffer:
        """Writes `value` for the next `steps` updates, from the current step on, without a sync.

        Steps past the end of the row go to its last entry, which holds for ever. The row of a float
        learning rate may have no other. No checkpoint keeps what was written.

        Args:
            value: a float or a one-element tensor on any device; the host waits for it only to
                write it to a buffer on the CPU.

        Raises:
            IndexError: there is no such row.
            TypeError: `steps` is no integer.
            ValueError: `steps` is less than 1, `value` has more than one element, or is a float
                that is negative or not finite.
        """
        self._row(row)
        steps = operator.index(steps)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"value must have one element, got shape {tuple(value.shape)}")
        else:
            value = checked_learning_rate(value)
        length = min(steps, self.capacity)
        for values, step in self._places:
            if isinstance(value, Tensor):
                source = on_device(value.detach().reshape(1), values.device).to(values.dtype)
            else:
                source = values.new_full((1,), value)
            positions = torch.arange(length, device=values.device).add_(step)
            positions.clamp_(max=self.capacity - 1)
            # Clamped positions coincide, but all write the same value.
            values[row].scatter_(0, positions, source.expand(length))
        return self

    def set_step_(self, step: int) -> None:
        """Makes `step` the next update, here and in all twins.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative.
        """
        step = checked_count("step", step)
        for _, position in self._places:
            position.fill_(step)

    def current(self, row: int) -> Tensor:
        """Returns the 0-d value that the next update reads from `row`, without a sync."""
        position = self.step.clamp(max=self.capacity - 1).reshape(1)
        return self._row(row).index_select(0, position).reshape(())

    def _row(self, row: int) -> Tensor:
        if not 0 <= row < len(self.rows):
            raise IndexError(f"row {row} is not in a buffer of {len(self.rows)} rows")
        return self.rows[row]
