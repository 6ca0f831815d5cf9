"""Learning-rate schedules: a profile, a warm-up, a floor and a sampling rate.

A schedule is a pure function of the step. What it is worth is decided in ``csrc/schedules.h``; this
module checks the arguments and gives the numbers a face.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_ext import ops

Sampling = int | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning-rate schedule; make one with `rex`, `linear`, `cosine` or `constant`.

    Update k runs at ``lr * (k + 1) / warmup_steps`` during the warm-up and then at
    ``min_lr + (lr - min_lr) * f(p)``, ``p = (k - warmup_steps) / (total_steps - warmup_steps)``.
    From ``total_steps`` on the value at p = 1 holds.

    Attributes:
        profile: name of f.
        lr: the value at p = 0.
        total_steps: the budget in optimizer updates, warm-up included; None has no end.
        warmup_steps: updates of linear warm-up.
        min_lr: the floor, reached at p = 1 if f(1) = 0.
        sampling: an integer n samples f every n updates; a tuple of increasing fractions x samples
            it at update 0 and at ceil(x * (total_steps - warmup_steps)) after the warm-up. In
            between the last sample holds.
        d: the shape of the profile "rex".

    >>> s = rex(1.0, total_steps=100)
    >>> s(0), round(s(50), 6), round(s(99), 6), s(100), s(1_000_000)
    (1.0, 0.666667, 0.019802, 0.0, 0.0)
    >>> linear(1.0, 8, warmup_steps=4, sampling=2).values(0, 9).tolist()
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0]
    """

    profile: str
    lr: float
    total_steps: int | None = None
    warmup_steps: int = 0
    min_lr: float = 0.0
    sampling: Sampling = 1
    d: float = 0.0

    def __post_init__(self) -> None:
        if self.profile not in ops.PROFILES:
            raise ValueError(f"profile must be one of {ops.PROFILES}, got {self.profile!r}")
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "lr", checked_learning_rate(self.lr))
        set_field(self, "min_lr", _real("min_lr", self.min_lr))
        set_field(self, "d", _real("d", self.d))
        set_field(self, "warmup_steps", _integer("warmup_steps", self.warmup_steps))
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must be in [0, lr] = [0, {self.lr}], got {self.min_lr}")
        if not 0.0 <= self.d < 1.0:
            raise ValueError(f"d must be in [0, 1), got {self.d}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if self.total_steps is not None:
            set_field(self, "total_steps", _integer("total_steps", self.total_steps))
            if self.total_steps <= 0:
                raise ValueError(f"total_steps must be positive, got {self.total_steps}")
            if self.warmup_steps > self.total_steps:
                raise ValueError(
                    f"warmup_steps must not exceed total_steps = {self.total_steps}, "
                    f"which it is part of, got {self.warmup_steps}"
                )
        elif self.profile != "constant":
            raise ValueError(f"total_steps must be given for the profile {self.profile!r}")
        set_field(self, "sampling", _sampling(self.sampling, self.total_steps))

    def __call__(self, step: int) -> float:
        """Returns the learning rate of update `step` (from 0) as a Python float."""
        return ops.native_schedule(self).value(_step("step", step))

    def values(self, start: int, stop: int) -> NDArray[np.float64]:
        """Returns the learning rates of the updates start, ..., stop - 1, shape (stop - start,)."""
        start, stop = _step("start", start), _step("stop", stop)
        if stop < start:
            raise ValueError(f"stop must not be less than start = {start}, got {stop}")
        return ops.native_schedule(self).values(start, stop)

    def scaled(self, factor: float) -> Schedule:
        """Returns the same shape at `factor` times the height, floor included."""
        factor = _real("factor", factor)
        return dataclasses.replace(self, lr=self.lr * factor, min_lr=self.min_lr * factor)

    def with_total_steps(self, total_steps: int) -> Schedule:
        """Returns the schedule of another budget; the warm-up keeps its length in updates."""
        return dataclasses.replace(self, total_steps=total_steps)

    def to_dict(self) -> dict[str, Any]:
        """Returns the schedule as plain numbers and strings.

        >>> linear(0.1, 100).to_dict() == {
        ...     "profile": "linear", "lr": 0.1, "total_steps": 100, "warmup_steps": 0,
        ...     "min_lr": 0.0, "sampling": 1, "d": 0.0}
        True
        """
        fields = dataclasses.asdict(self)
        if isinstance(self.sampling, tuple):
            fields["sampling"] = list(self.sampling)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Schedule:
        """Returns the schedule that `to_dict` described.

        Raises:
            ValueError: a key is unknown or missing.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - names)
        missing = sorted({"profile", "lr"} - set(fields))
        if unknown or missing:
            raise ValueError(f"not a schedule: unknown keys {unknown}, missing keys {missing}")
        return cls(**fields)


def rex(
    lr: float,
    total_steps: int,
    *,
    d: float = 0.5,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the REX schedule, f(p) = (1 - p) / (1 - d p).

    Args:
        lr: the peak, at the first update after the warm-up.
        total_steps: the budget in optimizer updates, warm-up included.
        d: in [0, 1). 0.5 is the paper's curve 2(1 - p) / (2 - p), 0 is linear, towards 1 it stays
            high longer; 0.9 is the value in the authors' later code.
        warmup_steps, min_lr, sampling: see `Schedule`.

    Raises:
        ValueError: a number is outside its range.

    Source: Chen, Wolfe, Kyrillidis, REX: Revisiting Budgeted Training with an Improved Schedule,
    MLSys 2022, arXiv 2107.04197.

    >>> round(rex(3e-4, total_steps=10_000)(5_000), 9)
    0.0002
    """
    return Schedule(
        profile="rex",
        lr=lr,
        total_steps=total_steps,
        d=d,
        warmup_steps=warmup_steps,
        min_lr=min_lr,
        sampling=sampling,
    )


def linear(
    lr: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the linear decay, f(p) = 1 - p; the arguments are those of `rex`.

    Source: Li, Yumer, Ramanan, Budgeted Training, ICLR 2020, arXiv 1905.04753.

    >>> linear(0.1, 100, min_lr=0.01)(50)
    0.055
    """
    return Schedule(
        profile="linear",
        lr=lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        min_lr=min_lr,
        sampling=sampling,
    )


def cosine(
    lr: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the cosine decay, f(p) = (1 + cos(pi p)) / 2; the arguments are those of `rex`.

    Source: Loshchilov, Hutter, SGDR, ICLR 2017, arXiv 1608.03983.

    >>> cosine(0.1, 100)(50)
    0.05
    """
    return Schedule(
        profile="cosine",
        lr=lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        min_lr=min_lr,
        sampling=sampling,
    )


def constant(
    lr: float,
    total_steps: int | None = None,
    *,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    sampling: Sampling = 1,
) -> Schedule:
    """Returns the constant schedule, f(p) = 1, without an end unless `total_steps` is given.

    Source: the baseline "none" of arXiv 2107.04197.

    >>> constant(0.1, warmup_steps=2).values(0, 4).tolist()
    [0.05, 0.1, 0.1, 0.1]
    """
    return Schedule(
        profile="constant",
        lr=lr,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        min_lr=min_lr,
        sampling=sampling,
    )


def _real(name: str, value: float) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def checked_learning_rate(value: float) -> float:
    """Returns `value` as a Python float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or not finite.
    """
    if isinstance(value, (bool, str)):
        raise TypeError(f"lr must be a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"Invalid learning rate: {number}; it must be finite and not negative")
    return number


def _integer(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _step(name: str, value: int) -> int:
    step = _integer(name, value)
    if step < 0:
        raise ValueError(f"{name} must not be negative, got {step}")
    return step


def _sampling(value: Sampling, total_steps: int | None) -> Sampling:
    if not isinstance(value, (tuple, list)):
        every = _integer("sampling", value)
        if every < 1:
            raise ValueError(f"sampling must be at least 1 update, got {every}")
        return every
    fractions = tuple(_real("sampling", fraction) for fraction in value)
    if total_steps is None:
        raise ValueError("sampling at fractions needs total_steps, of which they are fractions")
    if not fractions:
        raise ValueError("sampling must have at least one fraction, got ()")
    if any(not 0.0 < fraction < 1.0 for fraction in fractions):
        raise ValueError(f"sampling fractions must be in (0, 1), got {fractions}")
    if any(a >= b for a, b in itertools.pairwise(fractions)):
        raise ValueError(f"sampling fractions must increase, got {fractions}")
    return fractions
