"""Learning-rate schedules: pure functions of the step, frozen and comparable.

Make them with the functions of `lrs_ext.constructors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrs_ext.number_checks import checked_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, repr=False)
class Schedule:
    """A learning rate for every step; what all schedules have in common.

    Attributes:
        lr: the height: the peak of a profile, the largest value of a table.
        total_steps: the budget in optimizer updates, from which on the value holds; None has no
            end.

    >>> import lrs_ext
    >>> s = lrs_ext.rex(1.0, total_steps=100)
    >>> s(0), round(s(50), 6), round(s(99), 6), s(100), s(1_000_000)
    (1.0, 0.666667, 0.019802, 0.0, 0.0)
    >>> s
    rex(lr=1.0, total_steps=100, d=0.5)
    >>> lrs_ext.linear(1.0, 8, warmup_steps=4, sampling=2).values(0, 9).tolist()
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0]
    """

    lr: float
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if type(self) is Schedule:
            raise TypeError("make a schedule by a constructor, as lrs_ext.rex(lr, total_steps)")

    def __call__(self, step: int) -> float:
        """Returns the learning rate of update `step` (from 0) as a Python float.

        Raises:
            TypeError, ValueError: `step` is no integer, or negative.
        """
        return self._value(checked_count("step", step))

    def values(self, start: int, stop: int) -> NDArray[np.float64]:
        """Returns the learning rates of the updates start, ..., stop - 1, shape (stop - start,).

        Raises:
            TypeError, ValueError: they are no integers, negative, or `stop` is less than `start`.
        """
        start, stop = checked_count("start", start), checked_count("stop", stop)
        if stop < start:
            raise ValueError(f"stop must not be less than start = {start}, got {stop}")
        return self._values(start, stop)

    @property
    def capacity(self) -> int:
        """The length of the shortest row of a buffer that holds the schedule."""
        raise NotImplementedError

    def fill_(self, row: Tensor) -> None:
        """Writes update k's learning rate to entry k of a row; from `capacity` on, the last holds.

        Args:
            row: float32, contiguous, 1-d, on any device.
        """
        raise NotImplementedError

    def value_in_row(self) -> Callable[[int], float]:
        """Returns the function from a step, unchecked, to what a row holds there."""
        last = self.capacity - 1
        return lambda step: self._value(min(step, last))

    @property
    def momentum(self) -> Schedule:
        """What momentum does under `one_cycle`: from high to low and back.

        Raises:
            AttributeError: the schedule is another one.
        """
        raise AttributeError(f"only one_cycle moves the momentum, not {self._name}")

    def scaled(self, factor: float) -> Schedule:
        """Returns the same shape at `factor` times the height, floor included.

        Raises:
            TypeError, ValueError: `factor` is no number, or negative or not finite.
        """
        raise NotImplementedError

    def with_total_steps(self, total_steps: int) -> Schedule:
        """Returns the schedule of another budget.

        A warm-up and the boundaries of `join` keep their place in updates, shares of the budget
        move with it, and a table is stretched: what stood at progress p still stands there.

        Raises:
            TypeError, ValueError: it is no positive integer, too small for the warm-up or the last
                boundary, or the schedule is `inverse_sqrt`, which has no end.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Returns the schedule as plain numbers, strings, lists and dicts.

        >>> import lrs_ext
        >>> lrs_ext.linear(0.1, 100).to_dict() == {
        ...     "profile": "linear", "lr": 0.1, "total_steps": 100, "warmup_steps": 0,
        ...     "min_lr": 0.0, "sampling": 1}
        True
        """
        return {name: _plain(value) for name, value in self.fields().items()}

    def fields(self) -> dict[str, Any]:
        """Returns what `to_dict` does, but parts as schedules and a table as float64 bytes."""
        raise NotImplementedError

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Schedule:
        """Returns the schedule that `to_dict` described.

        Raises:
            TypeError: it is no dict.
            ValueError: a key is unknown or missing.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"from_dict takes what to_dict has returned, got {fields!r}")
        from lrs_ext.profile_schedule import ProfileSchedule
        from lrs_ext.table_schedules import JoinedSchedule, TableSchedule

        readers = {"table": TableSchedule.read, "join": JoinedSchedule.read}
        profile = fields.get("profile")
        reader = readers.get(profile) if isinstance(profile, str) else None
        return (reader or ProfileSchedule.read)(fields)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Returns a matplotlib Figure with the curve, drawn into `ax` if that is given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from lrs_ext.plots import plot_schedules

        return plot_schedules({self._name: self}, ax)

    @property
    def _name(self) -> str:
        raise NotImplementedError

    def _value(self, step: int) -> float:
        raise NotImplementedError

    def _values(self, start: int, stop: int) -> NDArray[np.float64]:
        raise NotImplementedError


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_dict()
    if isinstance(value, bytes):
        return np.frombuffer(value).tolist()
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def checked_keys(
    fields: Mapping[str, Any], required: set[str], optional: set[str] | None = None
) -> dict[str, Any]:
    """Returns what `Schedule.to_dict` wrote, with all of the required keys and no unknown ones."""
    unknown = sorted(set(fields) - required - (optional or set()) - {"profile"})
    missing = sorted(required - set(fields))
    if unknown or missing:
        raise ValueError(f"not a schedule: unknown keys {unknown}, missing keys {missing}")
    return dict(fields)
