"""The course of the learning rate within a segment, as a share of the rate that was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrs_ext.autolrs.timetable import IDLE_SHARE, Segment, Timetable
from lrs_ext.constructors import constant, linear, named_schedule
from lrs_ext.profile_schedule import ProfileSchedule
from lrs_ext.schedules import Schedule

WARMUP_SHARE = 0.1  # of the training of "peak": the choice of the peak then matters less


def usual_warmup(schedule: str | Schedule, train_steps: int) -> int:
    """Returns the warm-up of the training of "peak", of which nobody has said how long it is."""
    profile = schedule.profile if isinstance(schedule, ProfileSchedule) else schedule
    return 0 if profile == "one_cycle" else int(WARMUP_SHARE * train_steps)


def unit_schedule(schedule: str | Schedule, total_steps: int, warmup_steps: int) -> Schedule:
    """Returns the schedule at height 1 and of `total_steps` updates.

    Args:
        schedule: the name of one, or one of any height and length, whose warm-up is replaced.

    Raises:
        TypeError: it is neither.
        ValueError: there is no such schedule, or its height is 0, or it cannot be stretched; or the
            warm-up is too long.
    """
    if warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps must not exceed the {total_steps} updates after the search, "
            f"got {warmup_steps}"
        )
    if isinstance(schedule, str):
        schedule = named_schedule(schedule, total_steps)
    if not isinstance(schedule, Schedule):
        raise TypeError(f'schedule must be a name, as "rex", or a Schedule, got {schedule!r}')
    if not isinstance(schedule, ProfileSchedule) or schedule.profile == "inverse_sqrt":
        raise ValueError(
            "schedule must have a profile that can be stretched to the budget, unlike a table, a "
            f"join or inverse_sqrt, got {schedule!r}"
        )
    if not schedule.lr > 0.0:
        raise ValueError(f"schedule must have a positive lr, of which it is a shape: {schedule}")
    return dataclasses.replace(
        schedule,
        lr=1.0,
        min_lr=schedule.min_lr / schedule.lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


@dataclass(frozen=True)
class Shape:
    """The shape of one segment.

    Attributes:
        values: float64, (updates,), on the parameters' device; the last entry holds.
        at: from an update, counted from the segment's start and unchecked, to the same on the host.
    """

    values: Tensor
    at: Callable[[int], float]


class Shapes:
    """The shapes of all segments, on the device from the start.

    A trial of "peak" decays linearly to zero and stays there for its last updates, unless the
    schedule keeps to more than half of its height; one of "paper" keeps its rate, as its stage
    does.

    Args:
        warmup_steps: of the last training segment, unless the run begins with a warm-up of its own.
    """

    def __init__(
        self,
        schedule: str | Schedule,
        timetable: Timetable,
        warmup_steps: int,
        device: torch.device,
    ) -> None:
        last = timetable.segments[-1]
        has_own_warmup = timetable.segments[0].kind == "warmup"
        self.schedule = unit_schedule(schedule, last.steps, 0 if has_own_warmup else warmup_steps)
        decays = self.schedule(last.steps) <= 0.5
        self._last = last
        schedules: dict[tuple[str, int], Schedule] = {}
        for segment in timetable.segments:
            if segment is last:
                shape = self.schedule
            elif segment.kind == "warmup":
                shape = constant(1.0, warmup_steps=segment.steps)
            elif segment.kind == "trial" and timetable.num_downhill and decays:
                idle = int(IDLE_SHARE * segment.steps)
                shape = linear(1.0, segment.steps - idle)
            else:
                shape = constant(1.0)
            schedules[self._key(segment)] = shape
        self._shapes = {
            key: Shape(
                torch.from_numpy(shape.values(0, shape.capacity)).to(device), shape.value_in_row()
            )
            for key, shape in schedules.items()
        }

    def of(self, segment: Segment) -> Shape:
        return self._shapes[self._key(segment)]

    def _key(self, segment: Segment) -> tuple[str, int]:
        return "last" if segment == self._last else segment.kind, segment.steps
