"""Schedules that are a profile on [0, 1], a warm-up, a floor and a sampling rate.

What they are worth is decided in ``csrc/schedules.h``; this module checks the numbers and gives
them a face.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrs_ext import ops
from lrs_ext.number_checks import (
    checked_count,
    checked_fractions,
    checked_integer,
    checked_learning_rate,
    checked_positive_count,
    checked_real,
)
from lrs_ext.profiles import Parameters, checked_parameters, parameter_names
from lrs_ext.schedules import Schedule, checked_keys

Sampling = int | tuple[float, ...] | str

# The sampling rates of the REX paper, which plots the last three as 10-10, 5-25 and 1-100.
SAMPLING: Mapping[str, int | tuple[float, ...]] = MappingProxyType(
    {
        "50-75": (0.5, 0.75),
        "33-66": (0.33, 0.66),
        "25-50-75": (0.25, 0.5, 0.75),
        "every 10 %": tuple(k / 10 for k in range(1, 10)),
        "every 5 %": tuple(k / 20 for k in range(1, 20)),
        "every 1 %": tuple(k / 100 for k in range(1, 100)),
        "every iteration": 1,
    }
)


@dataclass(frozen=True, kw_only=True, repr=False)
class ProfileSchedule(Schedule):
    """A profile f on [0, 1] with a warm-up, a floor and a sampling rate.

    Update k runs at ``lr * (k + 1) / warmup_steps`` during the warm-up and then at
    ``min_lr + (lr - min_lr) * f(p)``, ``p = (k - warmup_steps) / (total_steps - warmup_steps)``.
    From ``total_steps`` on the value at p = 1 holds.

    Attributes:
        profile: name of f.
        warmup_steps: updates of linear warm-up, part of `total_steps`.
        min_lr: the floor, reached at p = 1 if f(1) = 0.
        sampling: an integer n samples f every n updates; a tuple of increasing fractions x samples
            it at update 0 and at ceil(x * (total_steps - warmup_steps)) after the warm-up. In
            between the last sample holds. A name of `SAMPLING` stands for what is there.
        parameters: (name, value) of what else shapes f, as in `lrs_ext.profiles`.
    """

    profile: str
    warmup_steps: int = 0
    min_lr: float = 0.0
    sampling: Sampling = 1
    parameters: Parameters = ()

    def __post_init__(self) -> None:
        parameters = checked_parameters(self.profile, self.parameters)
        set_field = object.__setattr__  # the dataclass is frozen
        set_field(self, "parameters", parameters)
        set_field(self, "lr", checked_learning_rate(self.lr))
        set_field(self, "min_lr", checked_real("min_lr", self.min_lr))
        set_field(self, "warmup_steps", checked_count("warmup_steps", self.warmup_steps))
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must be in [0, lr] = [0, {self.lr}], got {self.min_lr}")
        if self.total_steps is not None:
            set_field(self, "total_steps", checked_positive_count("total_steps", self.total_steps))
            if self.profile == "inverse_sqrt":
                raise ValueError(
                    f"inverse_sqrt has no end, so no total_steps, got {self.total_steps}: its "
                    "capacity says how many values a buffer gets"
                )
            if self.warmup_steps > self.total_steps:
                raise ValueError(
                    f"warmup_steps must not exceed total_steps = {self.total_steps}, "
                    f"which it is part of, got {self.warmup_steps}"
                )
        elif self.profile not in ("constant", "inverse_sqrt"):
            raise ValueError(f"total_steps must be given for the profile {self.profile!r}")
        if self.profile == "inverse_sqrt" and self.warmup_steps == 0:
            raise ValueError("warmup_steps must be positive for inverse_sqrt, got 0")
        if self.profile == "inverse_sqrt" and self.capacity < self.warmup_steps:
            raise ValueError(
                f"capacity must be at least warmup_steps = {self.warmup_steps}, which a buffer "
                f"must hold, got {self.capacity}"
            )
        if self.profile == "one_cycle" and self.warmup_steps > 0:
            raise ValueError(
                f"warmup_steps must be 0 for one_cycle, which rises by itself, got "
                f"{self.warmup_steps}"
            )
        set_field(self, "sampling", _checked_sampling(self.sampling, self.total_steps))

    def parameter(self, name: str) -> Any:
        """Returns a parameter of the profile by its name."""
        return dict(self.parameters)[name]

    @property
    def momentum(self) -> Schedule:
        if self.profile != "one_cycle":
            return super().momentum
        low, high = self.parameter("momentum")
        # The triangle upside down: `low` times 1 in the middle, times high / low at both ends.
        ends = (("low", high / low), ("momentum", (low, high)))
        return dataclasses.replace(self, lr=low, min_lr=0.0, parameters=ends)

    @property
    def capacity(self) -> int:
        if self.profile == "inverse_sqrt":
            return int(self.parameter("capacity"))
        return (self.warmup_steps if self.total_steps is None else self.total_steps) + 1

    def fill_(self, row: Tensor) -> None:
        if self.profile == "inverse_sqrt" and self.capacity < len(row):
            ops.fill_schedule(row[: self.capacity], self)
            row[self.capacity :].copy_(row[self.capacity - 1])
        else:
            ops.fill_schedule(row, self)

    def value_in_row(self) -> Callable[[int], float]:
        if self.profile == "inverse_sqrt":
            return super().value_in_row()
        return ops.native_schedule(self).value

    def scaled(self, factor: float) -> Schedule:
        factor = checked_real("factor", factor)
        return dataclasses.replace(self, lr=self.lr * factor, min_lr=self.min_lr * factor)

    def with_total_steps(self, total_steps: int) -> Schedule:
        return dataclasses.replace(self, total_steps=total_steps)

    def fields(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        fields.update(fields.pop("parameters"))
        return fields

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> ProfileSchedule:
        """Returns the schedule that `to_dict` described."""
        own = parameter_names(fields["profile"]) if "profile" in fields else ()
        fields = dict(fields)
        if "d" not in own and fields.get("d") == 0.0:
            del fields["d"]  # dicts of the first version have one for every profile
        common = {field.name for field in dataclasses.fields(cls)} - {"parameters"}
        optional = common - {"profile", "lr"}
        fields = checked_keys(fields, {"profile", "lr", *own}, optional)
        parameters = tuple((name, fields.pop(name)) for name in own)
        return cls(**fields, parameters=parameters)

    def __repr__(self) -> str:
        fields: dict[str, Any] = {"lr": self.lr}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("profile", "lr", "parameters") and value != field.default:
                fields[field.name] = value
        fields.update(self.parameters)
        return f"{self.profile}({', '.join(f'{name}={v!r}' for name, v in fields.items())})"

    @property
    def _name(self) -> str:
        return self.profile

    def _value(self, step: int) -> float:
        return ops.native_schedule(self).value(step)

    def _values(self, start: int, stop: int) -> NDArray[np.float64]:
        return ops.native_schedule(self).values(start, stop)


def _checked_sampling(value: Sampling, total_steps: int | None) -> int | tuple[float, ...]:
    if isinstance(value, str):
        if value not in SAMPLING:
            raise ValueError(f"sampling must be one of {list(SAMPLING)}, got {value!r}")
        value = SAMPLING[value]
    if not isinstance(value, (tuple, list, np.ndarray)):
        try:
            every = checked_integer("sampling", value)
        except TypeError:
            raise TypeError(
                "sampling must be an integer, increasing fractions or one of "
                f"{list(SAMPLING)}, got {value!r}"
            ) from None
        if every < 1:
            raise ValueError(f"sampling must be at least 1 update, got {every}")
        return checked_count("sampling", every)
    if total_steps is None:
        raise ValueError("sampling at fractions needs total_steps, of which they are fractions")
    return checked_fractions("sampling", value)
