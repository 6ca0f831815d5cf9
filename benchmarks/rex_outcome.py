"""What the finished runs say: test metrics by setting, budget, schedule and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import rex_paper
from rex_runs import Job, Place, Row, Scale, places
from rex_settings import PROFILES, SCHEDULES
from rex_stack import Run

import lrs_ext

LOW, HIGH = (1, 5, 10), (25, 50, 100)  # percent: the paper's halves of its Table 1
PlaceKey = tuple[str, int]
Grid = dict[PlaceKey, dict[str, float]]


@dataclass(frozen=True)
class Tested:
    """A place whose test runs are there.

    Attributes:
        values: test metric of each seed by schedule, inf where a run diverged.
        profiles: the same by (sampling rate, profile), empty unless the place is in Table 2.
    """

    place: Place
    values: dict[str, list[float]]
    profiles: dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Outcome:
    """All that is known.

    Attributes:
        jobs: of all places, as far as they are known.
        missing: the places that have no test yet.
    """

    scale: Scale
    jobs: list[Job]
    tested: dict[PlaceKey, Tested]
    missing: list[PlaceKey]

    def grid(self, seed: int | None = None, budgets: Sequence[int] = LOW + HIGH) -> Grid:
        """Returns the test metrics of all schedules: means over the seeds, or those of one."""
        chosen = slice(None) if seed is None else slice(seed, seed + 1)
        return {
            key: {name: mean(values[chosen]) for name, values in tested.values.items()}
            for key, tested in self.tested.items()
            if key[1] in budgets
        }


def seven(grid: Mapping[PlaceKey, Mapping[str, float]]) -> Grid:
    """Returns a grid of the paper's seven schedules, plateau within step as in its Table 1."""
    merged = {key: rex_paper.merge_plateau(values) for key, values in grid.items()}
    return {key: {name: own[name] for name in rex_paper.SEVEN} for key, own in merged.items()}


def gather(scale: Scale, results: Mapping[Job, Row]) -> Outcome:
    """Returns the outcome of the results that belong to a scale."""
    outcome = Outcome(scale, [], {}, [])
    for place in places(scale, results):
        outcome.jobs.extend(place.jobs)
        key = place.setting.name, place.budget
        tests = [job for job in place.jobs if job.phase == "test"]
        if tests and all(job in results for job in tests):
            outcome.tested[key] = read_place(place, tests, results)
        else:
            outcome.missing.append(key)
    return outcome


def read_place(place: Place, tests: Sequence[Job], results: Mapping[Job, Row]) -> Tested:
    by_run: dict[Run, list[float]] = {}
    for job in tests:
        for run, value in zip(job.runs, results[job]["test"], strict=True):
            by_run.setdefault(run, []).append(math.inf if value is None else value)
    values = {name: by_run[place.chosen[name]] for name in SCHEDULES}
    profiles = {}
    if place.profile_exponent is not None:
        for sampling in lrs_ext.SAMPLING:
            for profile in PROFILES:
                run = Run(profile, place.profile_exponent, sampling)
                profiles[sampling, profile] = by_run[run]
    return Tested(place, values, profiles)


def mean(values: Sequence[float]) -> float:
    """Returns the mean to six digits: what rounding alone tells apart is a tie."""
    return float(f"{np.mean(values):.6g}")


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation over seeds, NaN for one seed or a diverged run."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return float(np.std(values, ddof=1))
