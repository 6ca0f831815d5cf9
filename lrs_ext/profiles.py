"""What shapes each profile besides its height and length: names and ranges of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lrs_ext import ops
from lrs_ext.number_checks import checked_fractions, checked_positive_count, checked_real

Parameter = float | int | str | tuple[float, ...]
Parameters = tuple[tuple[str, Parameter], ...]


def _in(text: str, is_valid: Callable[[float], bool]) -> Callable[[str, Any], Parameter]:
    def check(name: str, value: Any) -> float:
        number = checked_real(name, value)
        if not is_valid(number):
            raise ValueError(f"{name} must be {text}, got {number}")
        return number

    return check


def _cooldown(name: str, value: Any) -> str:
    if value not in ops.COOLDOWNS:
        raise ValueError(f"{name} must be one of {ops.COOLDOWNS}, got {value!r}")
    return str(value)


def _momentum(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (low, high), got {value!r}")
    low, high = (checked_real(name, number) for number in value)
    if not 0.0 < low <= high < 1.0:
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high < 1, got {(low, high)}")
    return low, high


_POSITIVE = _in("positive", lambda x: x > 0.0)

_CHECKS: Mapping[str, Mapping[str, Callable[[str, Any], Parameter]]] = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "rex": {"d": _in("in [0, 1)", lambda x: 0.0 <= x < 1.0)},
    "exponential": {"gamma": _in("0 or less", lambda x: x <= 0.0)},
    "step_decay": {
        "milestones": checked_fractions,
        "gamma": _in("in [0, 1]", lambda x: 0.0 <= x <= 1.0),
    },
    "delayed_linear": {"delay": _in("in [0, 1)", lambda x: 0.0 <= x < 1.0)},
    "polynomial": {"power": _POSITIVE},
    "one_cycle": {"low": _in("0 or more", lambda x: x >= 0.0), "momentum": _momentum},
    "wsd": {"decay": _in("in (0, 1]", lambda x: 0.0 < x <= 1.0), "cooldown": _cooldown},
    "inverse_sqrt": {"capacity": checked_positive_count},
}


def parameter_names(profile: str) -> tuple[str, ...]:
    """Returns the names of a profile's parameters, in order.

    Raises:
        ValueError: there is no such profile.
    """
    if profile not in ops.PROFILES:
        raise ValueError(f"profile must be one of {ops.PROFILES}, got {profile!r}")
    return tuple(_CHECKS[profile])


def checked_parameters(profile: str, parameters: Parameters) -> Parameters:
    """Returns all parameters of a profile as Python values, in order.

    Raises:
        TypeError, ValueError: one is missing, unknown or out of range.
    """
    given = dict(parameters)
    if set(given) != set(parameter_names(profile)):
        raise ValueError(
            f"{profile} has the parameters {parameter_names(profile)}, got {tuple(given)}"
        )
    return tuple((name, check(name, given[name])) for name, check in _CHECKS[profile].items())
