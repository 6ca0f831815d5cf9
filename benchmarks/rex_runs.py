"""Which runs the comparison needs: tuning, wider grids where the best rate is at the edge, tests.

A job is one stack of models of a setting, budget and seed. What comes next follows from the results
so far alone, so that a comparison that was stopped goes on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from job_runner import read_lines
from rex_settings import PROFILES, SCHEDULES, SETTINGS, Setting
from rex_stack import Run, Stack

import lrs_ext

Row = dict[str, Any]
Scores = dict[str, dict[int, float]]  # mean validation metric by schedule and exponent

VARIANTS = tuple(itertools.chain.from_iterable(SCHEDULES.values()))
EVALUATION_UPDATES = 60  # that cost about as much as the evaluation of a model
BASE_PROFILES = ("exponential", "linear", "REX")  # they choose the learning rate of Table 2


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        fraction: of the settings' largest budgets.
        budgets: in percent of them.
        seeds, tuning_seeds: of the test runs; of those that choose the learning rates.
        exponents: of 3, the grid of learning rates at first.
        extensions: how many times it may be widened, by one place each.
        profile_budgets: of Table 2.
    """

    fraction: float
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    exponents: tuple[int, ...]
    extensions: int
    profile_budgets: tuple[int, ...]


FULL = Scale(1.0, (1, 5, 10, 25, 50, 100), (0, 1, 2), (100,), (-2, -1, 0, 1, 2), 4, (5, 25, 100))
QUICK = Scale(0.2, (10, 100), (0,), (100,), (-1, 0, 1), 0, (100,))


@dataclass(frozen=True)
class Job:
    """A stack of models; its result follows from it alone."""

    phase: Literal["tuning", "test"]
    setting: str
    budget: int
    steps: int
    seed: int
    runs: tuple[Run, ...]

    @property
    def work(self) -> float:
        """Seconds of a core, about."""
        updates = (self.steps + EVALUATION_UPDATES) * len(self.runs)
        return updates * SETTINGS[self.setting].microseconds / 1e6


def job_of(row: Row) -> Job:
    fields = {field.name: row[field.name] for field in dataclasses.fields(Job)}
    return Job(**{**fields, "runs": tuple(Run(*run) for run in row["runs"])})


def run_job(job: Job) -> Row:
    """Trains a stack; only the phase "test" looks at the test set, once."""
    wall, processor = time.perf_counter(), time.process_time()
    stack = Stack(SETTINGS[job.setting], job.seed, job.runs, job.steps)
    stack.train()
    row = dataclasses.asdict(job) | {"runs": [dataclasses.astuple(run) for run in job.runs]}
    row["validation"] = stack.evaluate("validation")
    if job.phase == "test":
        row["test"] = stack.evaluate("test")
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return row | {"seconds": round(wall, 2), "processor_seconds": round(processor, 2)}


def read_results(paths: Iterable[Path]) -> dict[Job, Row]:
    """Returns the results in files of JSON lines, or in a page's file of numbers (".json"); of two
    for one job, the later.
    """
    rows: list[Row] = []
    for path in paths:
        if path.suffix == ".json":
            rows += json.loads(path.read_text(encoding="utf-8"))["jobs"]
        else:
            rows += read_lines([path])
    return {job_of(row): row for row in rows}


@dataclass
class Place:
    """A setting and budget: its jobs as far as they are known, and what tuning found.

    Attributes:
        scores: of the schedules and variants of plateau, by exponent; inf where a run diverged.
        chosen: the run of each reported schedule, once its learning rate is tuned.
        profile_exponent: the learning rate of Table 2, if the place is part of it.
    """

    setting: Setting
    budget: int
    jobs: list[Job]
    scores: Scores
    chosen: dict[str, Run] = dataclasses.field(default_factory=dict)
    profile_exponent: int | None = None

    @property
    def at_edge(self) -> list[str]:
        """The schedules whose best learning rate is at the end of the grid all the same."""
        return [
            name
            for name, run in self.chosen.items()
            if run.exponent in (min(self.scores[run.schedule]), max(self.scores[run.schedule]))
        ]


def places(scale: Scale, results: Mapping[Job, Row]) -> Iterator[Place]:
    for setting in SETTINGS.values():
        for budget in scale.budgets:
            yield make_place(setting, budget, scale, results)


def make_place(setting: Setting, budget: int, scale: Scale, results: Mapping[Job, Row]) -> Place:
    """Follows a place from tuning to the test as far as the results go."""
    steps = setting.steps(budget, scale.fraction)

    def job(phase: Literal["tuning", "test"], seed: int, runs: Iterable[Run]) -> Job:
        return Job(phase, setting.name, budget, steps, seed, tuple(runs))

    place = Place(setting, budget, [], {name: {} for name in VARIANTS})
    wave = [Run(name, exponent) for name in VARIANTS for exponent in scale.exponents]
    for _ in range(scale.extensions + 1):
        jobs = [job("tuning", seed, wave) for seed in scale.tuning_seeds]
        place.jobs += jobs
        if not all(tuning in results for tuning in jobs):
            return place
        means = mean_metrics([results[tuning]["validation"] for tuning in jobs])
        for run, mean in zip(wave, means, strict=True):
            place.scores[run.schedule][run.exponent] = mean
        wave = beyond_edges(place.scores)
        if not wave:
            break
    place.chosen = choose(place.scores)
    tested = list(place.chosen.values())
    if setting.has_profiles and budget in scale.profile_budgets:
        place.profile_exponent = common_exponent(place.scores)
        tested += profile_runs(place.profile_exponent)
    place.jobs += [job("test", seed, dict.fromkeys(tested)) for seed in scale.seeds]
    return place


def mean_metrics(rows: list[list[float | None]]) -> list[float]:
    """Returns the means over seeds; one run without a finite metric makes them inf."""
    values = [[math.inf if value is None else value for value in row] for row in rows]
    return np.mean(values, axis=0).tolist()


def best_exponent(scores: Mapping[int, float]) -> int:
    """Returns the best place of the grid, of equals the lower learning rate."""
    return min(scores, key=lambda exponent: (scores[exponent], exponent))


def beyond_edges(scores: Scores) -> list[Run]:
    """Returns the runs that the grids lack: those next to a best one at an edge."""
    runs = []
    for name, by_exponent in scores.items():
        best = best_exponent(by_exponent)
        if best == min(by_exponent):
            runs.append(Run(name, best - 1))
        if best == max(by_exponent):
            runs.append(Run(name, best + 1))
    return runs


def choose(scores: Scores) -> dict[str, Run]:
    """Returns the best run by validation of each reported schedule."""
    chosen = {}
    for name, variants in SCHEDULES.items():
        runs = [Run(variant, best_exponent(scores[variant])) for variant in variants]
        chosen[name] = min(runs, key=lambda run: scores[run.schedule][run.exponent])
    return chosen


def common_exponent(scores: Scores) -> int:
    """Returns the learning rate that is best for the three profiles of the paper on average."""
    common = set.intersection(*(set(scores[name]) for name in BASE_PROFILES))
    means = {k: float(np.mean([scores[name][k] for name in BASE_PROFILES])) for k in common}
    return best_exponent(means)


def profile_runs(exponent: int) -> list[Run]:
    return [
        Run(profile, exponent, sampling) for sampling in lrs_ext.SAMPLING for profile in PROFILES
    ]


def missing_jobs(found: Iterable[Place], results: Mapping[Job, Row]) -> list[Job]:
    """Returns what can be run now, small budgets and tests first: what is begun is soon done."""
    jobs = [job for place in found for job in place.jobs if job not in results]
    return sorted(jobs, key=lambda job: (job.budget, job.phase == "tuning", -job.work))


def done_work(scale: Scale, results: Mapping[Job, Row]) -> float:
    return sum(j.work for place in places(scale, results) for j in place.jobs if j in results)


def expected_work(scale: Scale, results: Mapping[Job, Row]) -> float:
    """Returns the work of all places: of jobs not known yet, that of a grid without extensions."""
    total = 0.0
    for place in places(scale, results):
        total += sum(job.work for job in place.jobs)
        if not place.chosen:
            runs = [Run(name, 0) for name in SCHEDULES]
            if place.setting.has_profiles and place.budget in scale.profile_budgets:
                runs += profile_runs(0)
            steps = place.setting.steps(place.budget, scale.fraction)
            test = Job("test", place.setting.name, place.budget, steps, 0, tuple(runs))
            total += len(scale.seeds) * test.work
    return total
