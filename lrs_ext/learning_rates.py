"""The two sides of a group's learning rate: ``group["lr"]`` on the host, a row on the device."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lrs_ext import ops
from lrs_ext.buffer import ScheduleBuffer
from lrs_ext.host_copy import HostCopy
from lrs_ext.number_checks import checked_learning_rate
from lrs_ext.param_devices import on_device
from lrs_ext.positions import Group, Position, put_position
from lrs_ext.schedules import Schedule


@dataclass(frozen=True)
class Kept:
    """A schedule on its way back into a group that has had it: already at the group's height."""

    schedule: Schedule


def at_height_of(group: Group, schedule: Schedule | Kept) -> Schedule:
    """Returns the schedule at the height that the group's ``lr_scale`` asks for.

    That key is how timm, BEiT and others give layers their share of the learning rate.

    Raises:
        ValueError: it is no positive number.
    """
    if isinstance(schedule, Kept):
        return schedule.schedule
    scale = group.get("lr_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not float(scale) > 0.0:
        raise ValueError(f"lr_scale of a parameter group must be a positive number, got {scale!r}")
    return schedule if scale == 1.0 else schedule.scaled(float(scale))


@dataclass
class _Source:
    """Where one group's learning rate comes from."""

    rows: list[Tensor]  # on each device, what the kernels read: one float32 a step, the last holds
    schedule: Schedule | None = None
    value: Callable[[int], float] | None = None  # the schedule, from step to learning rate
    scheduled: float | None = None  # the very float last put into group["lr"] from here
    refill: Callable[[], None] | None = None  # writes the row, if somebody else drives it
    seen: float | Tensor | None = None  # what group["lr"] held when its row was last written
    outdated: float | None = None  # what it showed before the host has asked the device


class LearningRates:
    """Keeps each ``group["lr"]`` and its rows of the schedule buffers in step, without a sync.

    A group with a `Schedule`, which runs scaled by the group's ``lr_scale`` if it has one, shows on
    the host, as a float, what the next update will use. Any other float put there takes over from
    the next update. The very float that was found there hands control back: saving and restoring
    ``group["lr"]``, as distributed checkpoints do, changes nothing. A tensor is read at every
    update: where it is if it is float32 and on the device, otherwise through a copy, for which a
    CPU waits.

    Args:
        groups: the optimizer's parameter groups; a `Schedule` in ``group["lr"]`` is replaced by its
            value at `step`.
        devices: where the parameters are.
        step: committed updates so far.
        capacity: the least length of a row.
        filled: schedules by the groups whose rows somebody else fills with them.

    Attributes:
        buffer: that on the first device.
        buffers: one on each device, twins of each other.
    """

    def __init__(
        self,
        groups: list[Group],
        devices: Sequence[torch.device],
        step: int,
        capacity: int = 1,
        filled: Mapping[int, Schedule] = MappingProxyType({}),
    ) -> None:
        self.step = step
        first, *others = devices
        self.buffer = ScheduleBuffer(len(groups), max(_capacity(groups), capacity), first)
        self.buffer.step.fill_(step)
        self.buffers = {first: self.buffer, **{other: self.buffer.twin(other) for other in others}}
        self._skips: list[HostCopy] = []  # whether updates followed so far were skipped
        self._sources = [_Source(self._own_rows(index)) for index in range(len(groups))]
        for index, schedule in filled.items():
            self.buffer.schedules[index] = schedule
        for index, group in enumerate(groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and any(lr is other["lr"] for other in groups[:index]):
                group["lr"] = lr.clone()
            self.sync(index, group)

    def sync(self, index: int, group: Group) -> None:
        """Writes what the host put into ``group["lr"]`` to the device, if it is new.

        Raises:
            TypeError: it is no number.
            ValueError: it is negative or not finite, or a tensor of more than one element.
        """
        source = self._sources[index]
        lr = group["lr"]
        if lr is source.outdated and lr is not None:  # put back by a wrapper with its own groups
            lr = group["lr"] = source.scheduled
        if isinstance(lr, (Schedule, Kept)):
            group["lr"] = source.seen  # stays if the schedule does not fit
            self.buffer.fill_(index, at_height_of(group, lr))
        if self.buffer.schedules[index] is not source.schedule:
            # The line above or the owner of the buffer has filled the row.
            self._follow_schedule(index, group)
        elif lr is not source.seen or self._has_moved(index, lr):
            self._take(source, index, group)
        source = self._sources[index]
        if isinstance(source.seen, Tensor):
            for row, own_row in zip(source.rows, self._own_rows(index), strict=True):
                if row is own_row:
                    row.copy_(on_device(source.seen.detach().reshape(()), row.device))

    def withdraw(self, index: int, group: Group) -> None:
        """Takes away a schedule that waits in ``group["lr"]`` for the next `sync`."""
        if isinstance(group["lr"], (Schedule, Kept)):
            group["lr"] = self._sources[index].seen

    def _own_rows(self, index: int) -> list[Tensor]:
        """Returns the rows of a group in the buffers, whether they are read or not."""
        return [buffer.rows[index] for buffer in self.buffers.values()]

    def check_room(self, schedule: Schedule, was_captured: bool) -> None:
        """Raises RuntimeError if `schedule` needs longer rows, but a CUDA graph reads these."""
        if was_captured and schedule.capacity > self.buffer.capacity:
            raise RuntimeError(
                f"{schedule!r} needs rows of {schedule.capacity} values, but a CUDA graph reads "
                f"the present ones of {self.buffer.capacity}: make the optimizer anew, set the "
                "schedule and capture again, or start with a schedule that is as long, such as "
                f"lrs_ext.constant(lr, total_steps={schedule.capacity - 1})"
            )

    def is_synced(self, index: int, group: Group) -> bool:
        """Returns whether the row has what the host put into ``group["lr"]``."""
        source, lr = self._sources[index], group["lr"]
        is_filled = self.buffer.schedules[index] is source.schedule
        return is_filled and lr is source.seen and not self._has_moved(index, lr)

    def is_copied(self, index: int) -> bool:
        """Returns whether each update copies a tensor, which the kernels do not read in place."""
        source = self._sources[index]
        is_tensor = isinstance(source.seen, Tensor)
        return is_tensor and any(map(operator.is_, source.rows, self._own_rows(index)))

    def _has_moved(self, index: int, lr: float | Tensor | None) -> bool:
        """Whether a tensor that the kernels read in place has got another memory."""
        return isinstance(lr, Tensor) and any(
            row is not own_row and not lr.detach().is_set_to(row)
            for row, own_row in zip(self._sources[index].rows, self._own_rows(index), strict=True)
        )

    def _take(self, source: _Source, index: int, group: Group) -> None:
        lr = group["lr"]
        rows = self._own_rows(index)
        if lr is source.scheduled and source.refill is not None:
            source.rows = rows
            source.refill()
            source.seen = group["lr"]
            return
        if lr is source.scheduled and source.schedule is not None:
            self.buffer.fill_(index, source.schedule)
            self._follow_schedule(index, group)
            return
        if isinstance(lr, Tensor):
            # The value of a tensor on a device is its owner's affair: looking would be waiting.
            value = ops.host_value(lr) if lr.numel() == 1 else None
            check_learning_rate(lr if lr.numel() != 1 else 0.0 if value is None else value)
            is_readable = lr.dtype == torch.float32 and ops.has_memory(lr) and not lr.is_neg()
            source.rows = [
                lr.detach() if is_readable and lr.device == row.device else row for row in rows
            ]
        else:
            check_learning_rate(lr)
            for row in rows:
                row.fill_(float(lr))
            source.rows = rows
        source.seen = lr

    def _follow_schedule(self, index: int, group: Group) -> None:
        schedule = self.buffer.schedules[index]
        source = self._sources[index] = _Source(self._own_rows(index), schedule)
        if schedule is not None:
            source.value = schedule.value_in_row()
            group["lr"] = source.scheduled = source.seen = source.value(self.step)

    def row(self, index: int, place: int = 0) -> Tensor:
        """Returns what the kernels on device number `place` read: one float32 a step."""
        return self._sources[index].rows[place]

    def current(self, index: int, place: int = 0) -> Tensor:
        """Returns the 0-d value that the next update of the group uses there, without a sync."""
        row, buffer = self._sources[index].rows[place], list(self.buffers.values())[place]
        return buffer.current(index) if row is buffer.rows[index] else row.view(())

    def advance(
        self, groups: list[Group], known: ops.KnownGroups, found_inf: Tensor | None = None
    ) -> None:
        """Follows an update on the host.

        Args:
            known: what is known of the groups, to which what changes here is no news.
            found_inf: if not 0, there was none; where that is only known later, so is the step.
        """
        self.step += 1
        if found_inf is not None:
            self._skips.append(HostCopy(found_inf))
        while self._skips and self._skips[0].is_here:
            self.step -= self._skips.pop(0).read() != 0.0
        values: list[float | None] = []
        for source, group in zip(self._sources, groups, strict=True):
            values.append(None)
            if source.value is not None and group["lr"] is source.scheduled:
                values[-1] = source.scheduled = source.seen = source.value(self.step)
                source.outdated = None
        known.put(groups, "lr", values)

    def mark(self) -> Mark:
        """Returns where the host stands, for a later `roll_back`."""
        return Mark(self.step, tuple(self._skips))

    def roll_back(self, mark: Mark) -> None:
        """Follows the first device's step back to where it stood."""
        self.step = mark.step
        self._skips = list(mark.skips)
        for buffer in self.buffers.values():
            if buffer is not self.buffer:
                buffer.step.copy_(on_device(self.buffer.step, buffer.step.device))

    def schedule(self, index: int) -> Schedule | None:
        """Returns the schedule that is in charge of the group, if any."""
        source = self._sources[index]
        in_charge = source.schedule is not None and source.seen is source.scheduled
        return source.schedule if in_charge else None

    def follow_device(self, groups: list[Group]) -> None:
        """Takes the position from the device, which alone knows of replayed and skipped updates."""
        host_step, self.step = self.step, int(self.buffer.step)
        self._skips.clear()
        for index, group in enumerate(groups):
            self.sync(index, group)
            if self.step != host_step and self.schedule(index) is not None:
                outdated = self._sources[index].outdated
                outdated = group["lr"] if outdated is None else outdated
                self._follow_schedule(index, group)
                self._sources[index].outdated = outdated

    def save(
        self,
        index: int,
        saved_group: Group,
        updates: int | None,
        numbers: Mapping[str, Any],
        shown: Any,
        tables: dict[bytes, str],
    ) -> None:
        """Adds to a group of a checkpoint what it takes to resume; see `saved_position`.

        Args:
            numbers: what `HyperSchedules.save` has of it.
            shown: the learning rate of the group before the host has asked the device.
            tables: what the groups share; see `put_position`.
        """
        saved_group["lr"] = float(saved_group["lr"])
        position = Position(self.schedule(index), self.step, numbers)
        put_position(saved_group, position, updates, shown, tables)

    def loaded(
        self, groups: list[Group], positions: list[Position | None], updates: int | None
    ) -> LearningRates:
        """Takes over the groups of a checkpoint, in the present buffer if it is long enough.

        A group without a position comes from another optimizer: its float is kept only where no
        schedule is in charge here.
        """
        step = next((p.step for p in positions if p is not None), updates)
        step = int(self.buffer.step) if step is None else step
        for index, (group, position) in enumerate(zip(groups, positions, strict=True)):
            present = self._sources[index].seen
            schedule = self.schedule(index) if position is None else position.schedule
            if schedule is not None:
                group["lr"] = Kept(schedule)
            elif isinstance(present, Tensor):
                group["lr"] = present.fill_(group["lr"])
        if _capacity(groups) > self.buffer.capacity:
            return LearningRates(groups, list(self.buffers), step)
        self.step = step
        self._skips.clear()
        self.buffer.set_step_(step)
        for index, group in enumerate(groups):
            self.buffer.schedules[index] = None
            self._sources[index] = _Source(self._own_rows(index))
            self.sync(index, group)
        return self

    def drive(self, groups: list[Group], refill: Callable[[], None]) -> None:
        """Lets somebody else write the rows of all groups; waits for a tensor in charge of one.

        Whoever it is writes the rows of `driven`: something that the host puts into a
        ``group["lr"]`` takes over as ever, and the very float found there hands back.

        Args:
            refill: writes those rows, and shows what is in them if the host knows.
        """
        for index, group in enumerate(groups):
            self.buffer.schedules[index] = None
            lr = group["lr"] = float(group["lr"])
            rows = self._own_rows(index)
            self._sources[index] = _Source(rows, scheduled=lr, refill=refill, seen=lr)

    def driven(self, groups: list[Group]) -> list[int]:
        """Returns the groups of which the driver is in charge, not the host."""
        driven = []
        for index, (source, group) in enumerate(zip(self._sources, groups, strict=True)):
            if source.refill is None:
                continue
            if group["lr"] is source.scheduled:
                driven.append(index)
            elif source.seen is source.scheduled:
                source.seen = None  # the host may hand back before a step has seen it take over
        return driven

    def write_driven(self, groups: list[Group], values: Tensor) -> None:
        """Writes the rows of the driven groups on all devices.

        Args:
            values: (groups, capacity) or (groups, 1).
        """
        driven = self.driven(groups)
        for device, buffer in self.buffers.items():
            rows = on_device(values, device)
            if len(driven) == len(groups):
                buffer.values.copy_(rows)
            else:
                for index in driven:
                    buffer.rows[index].copy_(rows[index])

    def show(self, groups: list[Group], lrs: Sequence[float]) -> None:
        """Shows on the host what its driver has put into each row for the next update."""
        for source, group, lr in zip(self._sources, groups, lrs, strict=True):
            if source.refill is not None and group["lr"] is source.scheduled:
                if source.seen is source.scheduled:
                    source.seen = lr
                group["lr"] = source.scheduled = lr

    def rebuilt(
        self, groups: list[Group], devices: Sequence[torch.device], capacity: int = 1
    ) -> LearningRates:
        """Returns the same learning rates in new buffers: new groups, longer rows, other devices.

        Args:
            groups: those there were, in their places, before any that are new.
            capacity: the least length of a row; none gets shorter.
        """
        return self._rebuilt(groups, devices, capacity, range(len(self._sources)))

    def rearranged(self, groups: list[Group], places: Sequence[int]) -> LearningRates:
        """Returns the learning rates of the groups that were at `places`, in new buffers.

        Raises:
            RuntimeError: somebody else writes their rows.
        """
        if any(source.refill is not None for source in self._sources):
            raise RuntimeError(
                "the parameter groups have been removed or put in another order under AutoLRS or "
                "ReduceOnPlateau: do it before that is made"
            )
        return self._rebuilt(groups, list(self.buffers), 1, places)

    def _rebuilt(
        self,
        groups: list[Group],
        devices: Sequence[torch.device],
        capacity: int,
        places: Sequence[int],
    ) -> LearningRates:
        """As `rebuilt`, for groups that were at `places`, before any that are new."""
        # Elsewhere the host has put something new into the group.
        kept = {i for i, p in enumerate(places) if groups[i]["lr"] is self._sources[p].seen}
        filled = {}
        for index in kept:
            place = places[index]
            if self.buffer.schedules[place] is not self._sources[place].schedule:
                self._follow_schedule(place, groups[index])
            schedule = self.schedule(place)
            if schedule is not None:
                filled[index] = schedule
        capacity = max(capacity, self.buffer.capacity)
        rates = LearningRates(groups, devices, int(self.buffer.step), capacity, filled)
        for index, place in enumerate(places):
            if index in kept:  # somebody may have written to the row, whose last value holds
                old_row = self.buffer.rows[place]
                for row in rates._own_rows(index):
                    row[: len(old_row)].copy_(old_row)
                    row[len(old_row) :].copy_(old_row[-1])
            rates._keep_floats(index, groups[index], self._sources[place], index in kept)
        return rates

    def _keep_floats(self, index: int, group: Group, old: _Source, is_kept: bool) -> None:
        """Takes over the floats by which the group's source in other buffers has been known.

        Args:
            is_kept: the host has put nothing new into the group.
        """
        source = self._sources[index]
        if source.schedule is None:
            if old.scheduled is not None:  # it may hand back to whoever has been in charge
                self.buffer.schedules[index] = old.schedule
                seen = group["lr"] if is_kept else None
                self._sources[index] = replace(old, rows=source.rows, seen=seen)
        elif is_kept and source.scheduled == old.scheduled:  # which wrappers have in their groups
            source.scheduled = source.seen = group["lr"] = old.scheduled

    @property
    def zeroed_by_host(self) -> bool:
        """Whether somebody has written zeros over all learning rates, as far as the host knows."""
        return all(s.seen is not s.scheduled and _is_zero(s.seen) for s in self._sources)


@dataclass(frozen=True)
class Mark:
    """The host's count of updates, and which of them may still turn out to have been skipped."""

    step: int
    skips: tuple[HostCopy, ...] = ()


def check_learning_rate(lr: float | Tensor | Schedule) -> None:
    """Raises TypeError or ValueError if `lr` is no learning rate; waits for a device tensor."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if callable(lr) and not isinstance(lr, (Schedule, Tensor)):
        raise TypeError(
            f"lr must be a number, a tensor of one element or a Schedule, got {lr!r}: call a "
            "constructor, as lrs_ext.rex(lr, total_steps); lrs_ext.from_function(f, total_steps) "
            "makes a schedule of a function of the step"
        )
    if not isinstance(lr, Schedule):
        checked_learning_rate(float(lr) if isinstance(lr, Tensor) else lr)


def _capacity(groups: list[Group]) -> int:
    lrs = [group["lr"] for group in groups]
    schedules = [lr.schedule if isinstance(lr, Kept) else lr for lr in lrs]
    return max((s.capacity for s in schedules if isinstance(s, Schedule)), default=1)


def _is_zero(lr: float | Tensor | None) -> bool:
    return ops.host_value(lr) == 0.0 if isinstance(lr, Tensor) else lr == 0.0
