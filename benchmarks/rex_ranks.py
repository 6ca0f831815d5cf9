"""Ranks of schedules over places (settings and budgets), their shares, and what chance explains.

A grid maps a place to the values of the schedules there; lower is better everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

PlaceKey = TypeVar("PlaceKey", bound=Hashable)
Values = Mapping[str, float]

RESAMPLES = 10_000
LEVEL = 0.05


@dataclass(frozen=True)
class Standing:
    """How a schedule stands over the places where it takes part.

    Attributes:
        first, top_three: shares of the places, in percent.
        low, high: of a 95 % interval of the mean rank, places drawn again with replacement.
    """

    places: int
    first: float
    top_three: float
    mean_rank: float
    low: float
    high: float


def ranks(values: Values) -> dict[str, int]:
    """Returns 1 + the number of schedules that are strictly better: ties share the better rank.

    >>> ranks({"a": 3.0, "b": 1.0, "c": 3.0, "d": 4.0})
    {'a': 2, 'b': 1, 'c': 2, 'd': 4}
    """
    return {name: 1 + sum(other < own for other in values.values()) for name, own in values.items()}


def standings(grid: Mapping[PlaceKey, Values]) -> dict[str, Standing]:
    """Returns the standing of each schedule of a grid; the best mean rank comes first."""
    by_name: dict[str, list[int]] = {}
    for values in grid.values():
        for name, rank in ranks(values).items():
            by_name.setdefault(name, []).append(rank)
    found = {}
    for name, own in by_name.items():
        array = np.array(own)
        low, high = interval(array)
        first, top_three = (100.0 * float(np.mean(array <= limit)) for limit in (1, 3))
        found[name] = Standing(len(own), first, top_three, float(array.mean()), low, high)
    return dict(sorted(found.items(), key=lambda item: item[1].mean_rank))


def interval(samples: NDArray[np.generic]) -> tuple[float, float]:
    """Returns the bootstrap's 95 % interval of the mean; always the same for the same samples."""
    chosen = np.random.default_rng(0).integers(len(samples), size=(RESAMPLES, len(samples)))
    low, high = np.percentile(samples[chosen].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def friedman_p(grid: Mapping[PlaceKey, Values]) -> float:
    """Returns the probability of such unequal ranks if all schedules were alike (Friedman)."""
    from scipy.stats import friedmanchisquare

    names = list(next(iter(grid.values())))
    columns = [[finite(values[name]) for values in grid.values()] for name in names]
    return float(friedmanchisquare(*columns).pvalue)


def finite(value: float) -> float:
    """Returns the value, or in place of inf a number above all others: only ranks matter."""
    return value if math.isfinite(value) else 1e30


def critical_difference(schedules: int, places: int) -> float:
    """Returns how far two mean ranks must differ to be told from chance at 5 % (Nemenyi).

    Source: Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006.

    >>> round(critical_difference(5, 30), 2)  # 2.728 * sqrt(5 * 6 / (6 * 30))
    1.11
    """
    from scipy.stats import studentized_range

    quantile = studentized_range.ppf(1.0 - LEVEL, schedules, math.inf) / math.sqrt(2.0)
    return float(quantile * math.sqrt(schedules * (schedules + 1) / (6.0 * places)))


@dataclass(frozen=True)
class Duel:
    """One schedule against another, over the places.

    Attributes:
        clear_wins, clear_losses: places where all seeds agree.
        ratio: geometric mean of the other's values over the own ones: above 1 is a win.
        low, high: of its 95 % interval.
    """

    wins: int
    losses: int
    ties: int
    clear_wins: int
    clear_losses: int
    ratio: float
    low: float
    high: float


def duel(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Duel:
    """Compares values by place and seed; places where one of them diverged count, without a ratio.

    >>> d = duel([[1.0, 1.0], [2.0, 4.0]], [[2.0, 2.0], [4.0, 1.0]])
    >>> d.wins, d.losses, d.clear_wins, d.clear_losses
    (1, 1, 1, 0)
    """
    means = [(float(np.mean(a)), float(np.mean(b))) for a, b in zip(own, other, strict=True)]
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(own, other, strict=True)]
    logs = np.array([math.log(b / a) for a, b in means if math.isfinite(a + b)])
    low, high = interval(logs) if len(logs) else (math.nan, math.nan)
    return Duel(
        wins=sum(a < b for a, b in means),
        losses=sum(a > b for a, b in means),
        ties=sum(a == b for a, b in means),
        clear_wins=sum(all(a < b for a, b in pair) for pair in pairs),
        clear_losses=sum(all(a > b for a, b in pair) for pair in pairs),
        ratio=math.exp(float(logs.mean())) if len(logs) else math.nan,
        low=math.exp(low),
        high=math.exp(high),
    )
