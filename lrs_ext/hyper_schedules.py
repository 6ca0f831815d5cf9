"""Weight decay and momentum that follow schedules: floats on the host, rows on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrs_ext.number_checks import checked_number
from lrs_ext.positions import Group, Position
from lrs_ext.schedules import Schedule


@dataclass(frozen=True, eq=False)
class MovableNumber:
    """A hyper-parameter that may follow a schedule.

    Attributes:
        name: that of the kernels.
        key: that in a group, where "betas" are two numbers, of which this is the first.
        error: what torch says where it is out of range.
        limit: its values are in [0, limit).
    """

    name: str
    key: str
    error: str
    limit: float

    def of(self, group: Group) -> Any:
        """Returns what the group has: a number, a tensor or a schedule.

        Raises:
            TypeError: betas are no pair.
        """
        value = group[self.key]
        if self.key != "betas":
            return value
        if not isinstance(value, (tuple, list, np.ndarray)) or len(value) != 2:
            raise TypeError(f"betas must be a pair (beta1, beta2), got {value!r}")
        return value[0]

    def put(self, group: Group, value: Any) -> None:
        """Makes `value` what the group has."""
        group[self.key] = (value, *group["betas"][1:]) if self.key == "betas" else value

    def peak(self, schedule: Schedule) -> float:
        """Returns the largest value of `schedule` as the kernels read it.

        Raises:
            ValueError: a value is out of range.
        """
        lowest, highest = _extremes(schedule)
        if not (lowest >= 0.0 and highest < self.limit):
            raise ValueError(
                f"{self.error}: {highest if lowest >= 0.0 else lowest}; {schedule!r} must be in "
                f"[0, {self.limit:g}) at every step, in float32: scaled(factor) lowers it"
            )
        return highest


NUMBERS = (
    MovableNumber("weight_decay", "weight_decay", "Invalid weight_decay value", float("inf")),
    MovableNumber("momentum", "momentum", "Invalid momentum value", 1.0),
    MovableNumber("beta1", "betas", "Invalid beta parameter at index 0", 1.0),
)


def numbers_of(defaults: Group) -> tuple[MovableNumber, ...]:
    """Returns the numbers that groups with these keys have."""
    return tuple(number for number in NUMBERS if number.key in defaults)


def with_peaks(numbers: Sequence[MovableNumber], group: Group) -> Group:
    """Returns the group with the largest value of each schedule in its place.

    Whether there is a momentum at all, and what torch checks once, is a matter of that value.

    Raises:
        TypeError: a number is none, or cannot follow a schedule and is one.
        ValueError: a value of a schedule is out of range.
    """
    for number in numbers:
        value = number.of(group)
        if isinstance(value, Schedule):
            group = dict(group)
            number.put(group, number.peak(value))
    for key in ("weight_decay", "momentum", "dampening", "betas", "eps"):
        value = group.get(key, 0.0)
        for part in value if key == "betas" and key in group else (value,):
            if isinstance(part, Schedule):
                raise TypeError(
                    f"{key} cannot follow a schedule, got {part!r}: lr, weight_decay, and momentum "
                    "or betas[0] can"
                )
            if not isinstance(part, (bool, Tensor)):
                checked_number(key, part)
    return group


def put_schedules(
    numbers: Sequence[MovableNumber], group: Group, schedules: Mapping[str, Schedule]
) -> None:
    """Puts schedules, by the kernels' names of their numbers, into a group."""
    for number in numbers:
        if number.name in schedules:
            number.put(group, schedules[number.name])


@dataclass
class _Followed:
    """A schedule that is, or was until a float took over, in charge of a number."""

    schedule: Schedule
    value: Callable[[int], float]
    peak: float
    rows: list[Tensor]  # on each device: float32, one value a step, of which the last one holds
    shown: float  # the very float last put into the group from here
    outdated: float | None = None  # the one before the host has asked the device


@dataclass
class _GroupState:
    followed: dict[MovableNumber, _Followed] = field(default_factory=dict)
    seen: dict[MovableNumber, Any] = field(default_factory=dict)  # the numbers at the last sync
    held: dict[str, Any] = field(default_factory=dict)  # what the group held under their keys then
    rows: list[dict[str, Tensor]] = field(default_factory=list)  # those in charge, on each device
    is_listed: bool = False  # among the groups with schedules


class HyperSchedules:
    """Keeps numbers of the parameter groups in step with schedules, as `LearningRates` does "lr".

    A number with a `Schedule` shows on the host, as a float, what the next update will use. Another
    float put there takes over from the next update, and the very float that was found there hands
    control back. The kernels read the row of a schedule at their own step.

    Args:
        numbers: those that the groups have.
        groups: with schedules that `with_peaks` accepts.
        devices: where the parameters are.
        step: committed updates so far.
    """

    def __init__(
        self,
        numbers: Sequence[MovableNumber],
        groups: list[Group],
        devices: Sequence[torch.device],
        step: int,
    ) -> None:
        self._numbers = numbers
        self._devices = devices
        self._states: list[_GroupState] = []
        self._following: list[int] = []  # groups with schedules, in charge or not
        for group in groups:
            self.add(group, step)

    @property
    def are_there(self) -> bool:
        """Whether a group has a schedule, in charge or not."""
        return bool(self._following)

    def add(self, group: Group, step: int) -> None:
        """Follows the schedules of one more group."""
        self._states.append(_GroupState(rows=[{} for _ in self._devices]))
        self._follow_all(self._states[-1], group, step)

    def rearrange(self, places: Sequence[int]) -> None:
        """Follows groups that have been removed, or have changed places, from `places`."""
        self._states = [self._states[place] for place in places]
        self._following = [i for i, state in enumerate(self._states) if state.is_listed]

    def sync(self, index: int, group: Group, step: int, check: Callable[[Group], None]) -> Group:
        """Takes over what the host has put into the group; returns it as `fixed` does.

        Args:
            check: raises ValueError if the numbers of a group do not fit together.

        Raises:
            ValueError: a new schedule is out of range. What was there before is put back.
        """
        state = self._states[index]
        for key, held in state.held.items():
            if group[key] is not held:
                self._take(state, group, step, check)
                break
        return self._with_peaks_in_charge(state, group) if state.followed else group

    def is_synced(self, index: int, group: Group) -> bool:
        """Returns whether there is nothing new in the group for `sync` to take over."""
        return all(group[key] is held for key, held in self._states[index].held.items())

    def fixed(self, index: int, group: Group) -> Group:
        """Returns the group with the largest value of each schedule in charge in its place.

        It is the group itself where there is none, and otherwise does not change with the step.
        """
        return self._with_peaks_in_charge(self._states[index], group)

    def rows(self, index: int, place: int = 0) -> Mapping[str, Tensor]:
        """Returns what the kernels on device number `place` read, by their names of the numbers.

        Each row is float32, one value a step. The object is another one whenever a row is.
        """
        return self._states[index].rows[place]

    def current(
        self, index: int, hyper: Mapping[str, float], step: Tensor, place: int = 0
    ) -> dict[str, Any]:
        """Returns what the next update uses, with numbers that may move as float64, 0-d tensors.

        Args:
            hyper: the fixed numbers by the kernels' names.
            step: int64, 0-d: committed updates, on device number `place`.
        """
        numbers: dict[str, Any] = dict(hyper)
        rows = self.rows(index, place)
        for name in (number.name for number in self._numbers):
            if name in rows:
                position = step.clamp(max=len(rows[name]) - 1).reshape(1)
                numbers[name] = rows[name].index_select(0, position).reshape(()).double()
            else:
                numbers[name] = torch.full((), hyper[name], dtype=torch.float64, device=step.device)
        return numbers

    def show(self, groups: list[Group], step: int, is_late: bool = False) -> None:
        """Shows in the groups what the schedules in charge have for update `step`.

        Args:
            is_late: whether the host has just learned of the step from the device.
        """
        for index in self._following:
            state, group = self._states[index], groups[index]
            for number, followed in state.followed.items():
                if number.of(group) is followed.shown:
                    before = followed.shown
                    self._show(state, number, group, step)
                    if not is_late:
                        followed.outdated = None
                    elif followed.outdated is None and followed.shown is not before:
                        followed.outdated = before

    def in_charge(self, index: int) -> dict[str, Schedule]:
        """Returns the schedules that are in charge of numbers of a group, by the kernels' names."""
        state = self._states[index]
        return {n.name: f.schedule for n, f in state.followed.items() if state.seen[n] is f.shown}

    def moved(
        self, groups: list[Group], devices: Sequence[torch.device], step: int
    ) -> HyperSchedules:
        """Returns the same schedules with rows on other devices."""
        for state, group in zip(self._states, groups, strict=True):
            for number, followed in state.followed.items():
                if number.of(group) is followed.shown:
                    number.put(group, followed.schedule)
        return HyperSchedules(self._numbers, groups, devices, step)

    def save(self, index: int, saved_group: Group, shown: Group) -> dict[str, Any]:
        """Returns what a checkpoint needs for `resume`: plain numbers, strings, dicts, schedules.

        Args:
            shown: the group before the host has asked the device.
        """
        in_charge, saved = self.in_charge(index), {}
        for number in (number for number in self._numbers if number.name in in_charge):
            value, before = number.of(saved_group), number.of(shown)
            saved[number.name] = {
                "value": value,
                "shown": before if isinstance(before, float) else value,
                "schedule": in_charge[number.name],
            }
        return saved

    def resume(self, index: int, group: Group, position: Position | None) -> None:
        """Puts schedules into the group of a checkpoint, which holds floats.

        Those saved with it, as long as their number still is what was saved; into a group from
        another optimizer, without a position, those in charge here.
        """
        if position is None:
            put_schedules(self._numbers, group, self.in_charge(index))
            return
        for number in self._numbers:
            saved = position.numbers.get(number.name)
            if saved is not None and number.of(group) in (saved["value"], saved["shown"]):
                number.put(group, saved["schedule"])

    def load(self, groups: list[Group], step: int) -> None:
        """Takes over other groups, as many; rows that are long enough keep their place."""
        for state, group in zip(self._states, groups, strict=True):
            self._follow_all(state, group, step)

    def _take(
        self, state: _GroupState, group: Group, step: int, check: Callable[[Group], None]
    ) -> None:
        for number in self._numbers:
            value = number.of(group)
            followed = state.followed.get(number)
            if isinstance(value, Schedule):
                try:
                    check(with_peaks(self._numbers, self._with_peaks_in_charge(state, group)))
                except ValueError:
                    number.put(group, state.seen[number])
                    raise
                self._follow(state, number, value)
                self._show(state, number, group, step)
            elif followed is not None and value is followed.outdated:
                self._show(state, number, group, step)  # a wrapper has put it back
            elif followed is None or value is not followed.shown:
                state.seen[number] = value
            elif value is not state.seen[number]:  # was handed back
                self._show(state, number, group, step)
        self._settle(state, group)

    def _settle(self, state: _GroupState, group: Group) -> None:
        state.held = {number.key: group[number.key] for number in self._numbers}
        rows = [
            {n.name: f.rows[place] for n, f in state.followed.items() if state.seen[n] is f.shown}
            for place in range(len(self._devices))
        ]
        if [*map(id, rows[0].values())] != [*map(id, state.rows[0].values())]:
            state.rows = rows
        if state.is_listed != bool(state.followed):
            state.is_listed = bool(state.followed)
            self.rearrange(range(len(self._states)))

    def _follow_all(self, state: _GroupState, group: Group, step: int) -> None:
        for number in self._numbers:
            value = number.of(group)
            if isinstance(value, Schedule):
                self._follow(state, number, value)
                self._show(state, number, group, step)
            else:
                state.followed.pop(number, None)
                state.seen[number] = value
        self._settle(state, group)

    def _follow(self, state: _GroupState, number: MovableNumber, schedule: Schedule) -> None:
        present = state.followed.get(number)
        if present is not None and len(present.rows[0]) >= schedule.capacity:
            rows = present.rows
        else:
            rows = [
                torch.empty(schedule.capacity, dtype=torch.float32, device=device)
                for device in self._devices
            ]
        for row in rows:
            schedule.fill_(row)
        value = schedule.value_in_row()
        state.followed[number] = _Followed(schedule, value, number.peak(schedule), rows, value(0))

    def _show(self, state: _GroupState, number: MovableNumber, group: Group, step: int) -> None:
        followed = state.followed[number]
        value = followed.value(step)
        if value != followed.shown:  # copies of the group elsewhere hold the very float
            followed.shown = value
        state.seen[number] = followed.shown
        number.put(group, followed.shown)
        state.held[number.key] = group[number.key]

    def _with_peaks_in_charge(self, state: _GroupState, group: Group) -> Group:
        fixed = group
        for number, followed in state.followed.items():
            if number.of(group) is followed.shown:
                fixed = dict(group) if fixed is group else fixed
                number.put(fixed, followed.peak)
        return fixed


@functools.lru_cache(maxsize=16)
def _extremes(schedule: Schedule) -> tuple[float, float]:
    values = schedule.values(0, schedule.capacity)
    with np.errstate(over="ignore"):  # infinity is out of range
        return float(np.float32(values.min())), float(np.float32(values.max()))
