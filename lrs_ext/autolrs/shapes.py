"""The course of the learning rate within a segment, as a share of the rate that was found."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lrs_ext import schedules
from lrs_ext.autolrs.timetable import Segment, Timetable
from lrs_ext.schedules import Schedule

_BY_NAME = {
    "rex": schedules.rex,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "constant": schedules.constant,
}
TRIAL_WARMUP = 4  # a trial warms up for at most 1/TRIAL_WARMUP of its updates


def unit_schedule(schedule: str | Schedule, total_steps: int, warmup_steps: int) -> Schedule:
    """Returns the schedule at height 1 and of `total_steps` updates.

    Args:
        schedule: the name of one, or one of any height and length, whose warm-up is replaced.

    Raises:
        ValueError: there is no such schedule, or its height is 0.
    """
    if isinstance(schedule, str):
        if schedule not in _BY_NAME:
            raise ValueError(
                f"schedule must be one of {sorted(_BY_NAME)} or a Schedule, got {schedule!r}"
            )
        return _BY_NAME[schedule](1.0, total_steps, warmup_steps=warmup_steps)
    if not schedule.lr > 0.0:
        raise ValueError(f"schedule must have a positive lr, of which it is a shape: {schedule}")
    return dataclasses.replace(
        schedule,
        lr=1.0,
        min_lr=schedule.min_lr / schedule.lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


class Shapes:
    """The shapes of all segments, on the device from the start.

    Args:
        warmup_steps: in the last training segment, and for as long as it lasts in every trial.
    """

    def __init__(
        self,
        schedule: str | Schedule,
        timetable: Timetable,
        warmup_steps: int,
        device: torch.device,
    ) -> None:
        first, last = timetable.segments[0], timetable.segments[-1]
        has_own_warmup = first.kind == "warmup"
        self.schedule = unit_schedule(schedule, last.steps, 0 if has_own_warmup else warmup_steps)
        trial = next(s for s in timetable.segments if s.kind == "trial")
        ramp = 0 if has_own_warmup else min(warmup_steps, trial.steps // TRIAL_WARMUP)
        by_kind = {
            "trial": schedules.constant(1.0, warmup_steps=ramp),
            "train": schedules.constant(1.0),
            "last": self.schedule,
        }
        if has_own_warmup:
            by_kind["warmup"] = schedules.constant(1.0, warmup_steps=first.steps)
        self._last = last
        self._schedules = by_kind
        self._tensors = {
            kind: _tensor(shape, last.steps if kind == "last" else shape.warmup_steps, device)
            for kind, shape in by_kind.items()
        }

    def of(self, segment: Segment) -> Tensor:
        """Returns the shape of a segment, float64, (updates,); its last entry holds."""
        return self._tensors[self._kind(segment)]

    def at(self, segment: Segment, updates: int) -> float:
        """Returns the shape at an update, counted from the segment's start."""
        return self._schedules[self._kind(segment)](updates)

    def _kind(self, segment: Segment) -> str:
        return "last" if segment == self._last else segment.kind


def _tensor(shape: Schedule, end: int, device: torch.device) -> Tensor:
    return torch.from_numpy(shape.values(0, end + 1)).to(device)
