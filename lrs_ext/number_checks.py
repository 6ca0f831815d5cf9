"""Checks of plain numbers: each returns what it was given as a Python number, or raises.

TypeError says that something is no number, ValueError that it is out of range; both name it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def checked_number(name: str, value: Any) -> float:
    """Returns `value` as a float, which may be NaN or infinite."""
    try:
        if isinstance(value, (bool, np.bool_, str, np.complexfloating)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        way_out = ": convert it by float()" if isinstance(value, str) else ""
        raise TypeError(f"{name} must be a number, got {value!r}{way_out}") from None


def checked_learning_rate(value: Any, name: str = "lr") -> float:
    """Returns `value` as a float that is finite and not negative."""
    number = checked_number(name, value)
    if not (math.isfinite(number) and number >= 0.0):
        found = f"{number}" if name == "lr" else f"{number} in {name}"
        raise ValueError(f"Invalid learning rate: {found}; it must be finite and not negative")
    return number


def checked_real(name: str, value: Any) -> float:
    """Returns `value` as a finite float."""
    number = checked_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def checked_integer(name: str, value: Any) -> int:
    """Returns `value` as an integer; a float is none, even without a fraction."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        is_convertible = isinstance(value, str) or (isinstance(value, float) and value % 1.0 == 0.0)
        way_out = ": convert it by int()" if is_convertible else ""
        raise TypeError(f"{name} must be an integer, got {value!r}{way_out}") from None


def checked_count(name: str, value: Any) -> int:
    """Returns `value` as an integer that is not negative and that the native core can hold."""
    count = checked_integer(name, value)
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}")
    if count >= 2**63:
        raise ValueError(f"{name} must be less than 2**63, got {count}")
    return count


def checked_positive_count(name: str, value: Any) -> int:
    """Returns `value` as an integer of at least 1."""
    count = checked_integer(name, value)
    if count <= 0:
        raise ValueError(f"{name} must be positive, got {count}")
    return checked_count(name, count)


def checked_fractions(name: str, values: Any) -> tuple[float, ...]:
    """Returns `values`, shares of the budget, as increasing floats in (0, 1)."""
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of fractions, got {values!r}")
    fractions = tuple(checked_real(name, fraction) for fraction in values)
    if not fractions:
        raise ValueError(f"{name} must have at least one fraction, got ()")
    if any(not 0.0 < fraction < 1.0 for fraction in fractions):
        raise ValueError(f"{name} fractions must be in (0, 1), got {fractions}")
    if any(a >= b for a, b in itertools.pairwise(fractions)):
        raise ValueError(f"{name} fractions must increase, got {fractions}")
    return fractions
