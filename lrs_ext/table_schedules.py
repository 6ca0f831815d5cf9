"""Schedules that are made of values, or of other schedules."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrs_ext import ops
from lrs_ext.number_checks import (
    checked_integer,
    checked_learning_rate,
    checked_positive_count,
    checked_real,
)
from lrs_ext.schedules import Schedule, checked_keys


@dataclass(frozen=True, kw_only=True, repr=False)
class TableSchedule(Schedule):
    """A value for every update; the last one holds.

    Attributes:
        table: the float64 values of the updates 0, ..., total_steps.
    """

    table: bytes

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[Any]) -> TableSchedule:
        """Returns the schedule of at least two values, the last of which is the end's.

        Raises:
            TypeError, ValueError: `values` is no 1-d array of learning rates.
        """
        array = np.asarray(values)
        if array.ndim != 1 or len(array) < 2:
            raise ValueError(f"values must be 1-d, at least 2 of them, got shape {array.shape}")
        if array.dtype.kind not in "iuf":
            for index, value in enumerate(values):
                checked_learning_rate(value, f"values[{index}]")
        array = array.astype(np.float64)
        wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0.0)))
        if len(wrong):
            checked_learning_rate(array[wrong[0]], f"values[{wrong[0]}]")
        table = (array + 0.0).tobytes()  # -0.0 becomes 0.0: equal tables have equal bytes
        return cls(lr=float(array.max()), total_steps=len(array) - 1, table=table)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> TableSchedule:
        """Returns the schedule that `to_dict` described."""
        return cls.of(checked_keys(fields, {"values"})["values"])

    @property
    def capacity(self) -> int:
        return len(self._array)

    def fill_(self, row: Tensor) -> None:
        ops.fill_values(row, self._array)

    def scaled(self, factor: float) -> Schedule:
        return TableSchedule.of(self._array * checked_real("factor", factor))

    def with_total_steps(self, total_steps: int) -> Schedule:
        total_steps = checked_positive_count("total_steps", total_steps)
        present = len(self._array) - 1
        return TableSchedule.of(self._array[np.arange(total_steps + 1) * present // total_steps])

    def fields(self) -> dict[str, Any]:
        return {"profile": "table", "values": self.table}

    def __repr__(self) -> str:
        shown = np.array2string(self._array[:-1], threshold=6, separator=", ")
        return f"from_values({shown}, total_steps={self.total_steps}, then {self._array[-1]})"

    @property
    def _name(self) -> str:
        return "table"

    @property
    def _array(self) -> NDArray[np.float64]:
        return np.frombuffer(self.table)

    def _value(self, step: int) -> float:
        array = self._array
        return float(array[min(step, len(array) - 1)])

    def _values(self, start: int, stop: int) -> NDArray[np.float64]:
        array = self._array
        held = np.full(stop - start, array[-1])
        part = array[start:stop]
        held[: len(part)] = part
        return held


@dataclass(frozen=True, kw_only=True, repr=False)
class JoinedSchedule(Schedule):
    """Schedules one after another, each counting from its own start.

    Attributes:
        schedules: n of them.
        boundaries: the n - 1 updates at which the second and all later ones start.
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    @classmethod
    def of(cls, schedules: tuple[Schedule, ...], boundaries: Iterable[int]) -> JoinedSchedule:
        """Returns the schedules joined at the boundaries.

        Raises:
            TypeError, ValueError: the boundaries do not increase, or are too few or too many.
        """
        for index, schedule in enumerate(schedules):
            if not isinstance(schedule, Schedule):
                raise TypeError(f"schedules[{index}] must be a Schedule, got {schedule!r}")
        starts = tuple(checked_integer("boundaries", boundary) for boundary in boundaries)
        if len(starts) != len(schedules) - 1:
            raise ValueError(
                f"boundaries must be one fewer than schedules, got {len(starts)} boundaries for "
                f"{len(schedules)} schedules"
            )
        if any(a >= b for a, b in itertools.pairwise((0, *starts))):
            raise ValueError(f"boundaries must be positive and increase, got {starts}")
        last, start = schedules[-1], (0, *starts)[-1]
        return cls(
            lr=max(schedule.lr for schedule in schedules),
            total_steps=None if last.total_steps is None else start + last.total_steps,
            schedules=schedules,
            boundaries=starts,
        )

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> JoinedSchedule:
        """Returns the schedule that `to_dict` or `fields` described."""
        fields = checked_keys(fields, {"schedules", "boundaries"})
        schedules = tuple(
            part if isinstance(part, Schedule) else Schedule.from_dict(part)
            for part in fields["schedules"]
        )
        return cls.of(schedules, fields["boundaries"])

    @property
    def capacity(self) -> int:
        return (0, *self.boundaries)[-1] + self.schedules[-1].capacity

    def fill_(self, row: Tensor) -> None:
        for schedule, start, end in self._parts(len(row)):
            schedule.fill_(row[start:end])

    def value_in_row(self) -> Callable[[int], float]:
        values = [schedule.value_in_row() for schedule in self.schedules]
        starts, boundaries = (0, *self.boundaries), self.boundaries

        def value(step: int) -> float:
            index = bisect.bisect_right(boundaries, step)
            return values[index](step - starts[index])

        return value

    def scaled(self, factor: float) -> Schedule:
        scaled = tuple(schedule.scaled(factor) for schedule in self.schedules)
        return JoinedSchedule.of(scaled, self.boundaries)

    def with_total_steps(self, total_steps: int) -> Schedule:
        total_steps = checked_positive_count("total_steps", total_steps)
        start = (0, *self.boundaries)[-1]
        if total_steps <= start:
            raise ValueError(
                f"total_steps must be more than the last boundary {start}, got {total_steps}"
            )
        last = self.schedules[-1].with_total_steps(total_steps - start)
        return JoinedSchedule.of((*self.schedules[:-1], last), self.boundaries)

    def fields(self) -> dict[str, Any]:
        return {"profile": "join", "schedules": self.schedules, "boundaries": self.boundaries}

    def __repr__(self) -> str:
        return f"join({list(self.schedules)}, boundaries={list(self.boundaries)})"

    @property
    def _name(self) -> str:
        return "join"

    def _parts(self, end: int) -> list[tuple[Schedule, int, int]]:
        """Returns (schedule, start, end) of each, cut at the step `end`."""
        starts = (0, *self.boundaries)
        ends = (*self.boundaries, max(end, starts[-1]))
        spans = zip(self.schedules, starts, ends, strict=True)
        return [(s, start, min(stop, end)) for s, start, stop in spans if start < end]

    def _value(self, step: int) -> float:
        index = bisect.bisect_right(self.boundaries, step)
        return self.schedules[index]._value(step - (0, *self.boundaries)[index])

    def _values(self, start: int, stop: int) -> NDArray[np.float64]:
        pieces = [
            schedule._values(max(start, begin) - begin, end - begin)
            for schedule, begin, end in self._parts(stop)
            if end > start
        ]
        return np.concatenate(pieces) if pieces else np.empty(0)
